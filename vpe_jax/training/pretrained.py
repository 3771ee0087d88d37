"""Parameters that a run starts from, put where they go: published weights, or earlier runs'."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from vpe_jax.checkpoints import convert, imports, weights
from vpe_jax.config import Config, differences, nearest
from vpe_jax.contracts import PARENT, Array, Params, PretrainedWeights, System, UserError
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training.state import State

_CARRIED = ('params/', 'opt_state/', 'ema/', 'examples_seen')  # of the state of a run
_MEANING = ('data.tokenizer', 'model.visual_prompt.', 'model.image.')
_TREES = '(?:params|opt_state/[a-z_]+|ema)/'  # prefixes of a parameter's path in the state
_PARAMS = 'params/'

Mine = Callable[[str], bool]  # whether a parameter, by its path, is to come from a place


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Parameters loaded rather than initialized.

  Attributes:
    leaves: path in the state -> array, sharded as the state is.
    origins: path of a parameter -> where it is from, in words.
  """

  leaves: dict[str, Array]
  origins: dict[str, str]

  def __or__(self, other: Loaded) -> Loaded:
    return Loaded(self.leaves | other.leaves, self.origins | other.origins)


def load(system: System, abstract: State) -> Loaded:
  """Reads everything that a new run starts from: earlier runs, else published weights.

  Args:
    system: its config names the parent runs, its `initialization` the rest.
    abstract: the first state, with its shardings.

  Raises:
    UserError: runs or weights are missing, don't fit, or are of another size.
  """
  runs = system.config.starts
  _check_groups(runs, abstract['params'])
  groups = tuple(filter(None, runs))
  found = Loaded({}, {})
  if '' not in runs:
    rest = lambda path: not path.startswith(groups)
    found = _published(system.initialization.pretrained, abstract['params'], rest)
  for group, run in runs.items():
    mine = lambda path, g=group: path.startswith(g) if g else not path.startswith(groups)
    found |= _from_run(system, run, abstract, mine)
  return found


def _check_groups(runs: Mapping[str, str], abstract: Params) -> None:
  known = [f'{group}/' for group in abstract]
  for group in filter(None, runs):
    if group not in known:
      raise UserError(
        f'config.start takes {group} from {runs[group]}, and no parameter begins so'
        f'{nearest(group, known)}'
      )


def _published(starts: Sequence[PretrainedWeights], abstract: Params, mine: Mine) -> Loaded:
  """The weights that a system starts from, for every parameter of `mine` that they fill."""
  wanted, leaves, origins = leaves_by_path(abstract), {}, {}
  for start in starts:
    for path, leaf in leaves_by_path(_read(start, wanted)).items():
      for target in filter(mine, _targets(start, path)):
        leaves[_PARAMS + target] = _as(leaf, wanted[target], start.source, target)
        origins[target] = start.source
  return Loaded(leaves, origins)


def _from_run(system: System, run: str, abstract: State, mine: Mine) -> Loaded:
  """Leaves that a new run takes from the newest good checkpoint of its parent run.

  With `config.start_weights` of `state` that is all of its state but for its steps: parameters,
  optimizer, average, and where it was in the data. Else the parameters alone.

  Args:
    system: its `initialization` has what the parent run may lack.
    run: the other's workdir.
    abstract: our first state, with its shardings.
    mine: tells by its path whether a parameter is to come from this run.

  Raises:
    UserError: there is no such run, its parameters are not ours in paths and shapes, or the state
      that is carried on is that of another optimizer.
  """
  config, grown = system.config, Loaded({}, {})
  carries = config.start_weights == 'state'
  if carries:
    found, said = weights.read_run(run, _CARRIED)
    theirs = said['config']
    _check_optimizer(found, leaves_by_path(abstract), run)
  else:
    params, metadata = weights.load_run(run, config.start_weights)
    found, theirs = leaves_by_path({'params': params}), weights.config_of(metadata, run)
    grown = _grown(system.initialization.grown, found, abstract['params'], run)
  for line in other_meanings(config, run, theirs):
    logging.warning('%s', line)
  found = {path: leaf for path, leaf in (found | grown.leaves).items() if _of(path, mine)}

  def is_wanted(path: str) -> bool:
    fresh = any(re.match(f'{_TREES}(?:{one})', path) for one in system.initialization.optional)
    known = path.startswith(_CARRIED if carries else _PARAMS) and _of(path, mine)
    return known and (path in found or not fresh)

  wanted = {path: leaf for path, leaf in leaves_by_path(abstract).items() if is_wanted(path)}
  _check(wanted, found, run)
  leaves = {path: _as(leaf, wanted[path], run, path) for path, leaf in found.items()}
  taken = [path.removeprefix(_PARAMS) for path in leaves if path.startswith(_PARAMS)]
  origin = f'{run} ({config.start_weights})'
  return Loaded(leaves, {path: grown.origins.get(path, origin) for path in taken})


def _check_optimizer(theirs: Mapping[str, Any], ours: Mapping[str, Any], run: str) -> None:
  """Refuses the state of another optimizer: it would be of no use to ours."""
  trees = lambda leaves: {path.split('/')[1] for path in leaves if path.startswith('opt_state/')}
  if trees(theirs) != trees(ours):
    raise UserError(
      f'config.start_weights is state, and {run} holds that of another optimizer '
      f'({", ".join(sorted(trees(theirs)))}; ours has {", ".join(sorted(trees(ours)))}): set '
      'config.optim.name as in that run, or config.start_weights=ema'
    )


def _of(path: str, mine: Mine) -> bool:
  """Whether a leaf of the state is of a parameter that is `mine`; what is of none, is."""
  parameter = re.sub(f'^{_TREES}', '', path)
  return parameter == path or mine(parameter)


def other_meanings(config: Config, run: str, stored: Mapping[str, Any]) -> list[str]:
  """Lines on what a run and the one that it starts from read with different networks.

  Words, codes and latents are numbers, whose shapes don't say what they stand for.
  """
  found = differences(config, stored)
  # Of codecs of different kinds the kinds alone: their other fields are not comparable.
  others = tuple(field.removesuffix('kind') for field in found if field.endswith('.kind'))
  return [
    f'{run} was trained with {field}={theirs}, and this run has {ours}: unless both name '
    'the same, what it learned means something else here'
    for field, (theirs, ours) in found.items()
    if field.startswith(_MEANING) and (field.endswith('.kind') or not field.startswith(others))
  ]


def _grown(
  starts: Sequence[PretrainedWeights], found: Mapping[str, Any], abstract: Params, run: str
) -> Loaded:
  """Leaves that the parent run lacks: published weights, or copies of its own leaves."""
  made = Loaded({}, {})
  for start in starts:
    if any(path.startswith(f'{_PARAMS}{ours}') for _, ours in start.paths for path in found):
      continue
    if start.family != PARENT:
      made |= _published([start], abstract, lambda path: True)
      continue
    for path, leaf in found.items():
      own = path.removeprefix(_PARAMS)
      targets = _targets(start, own)
      origins = {ours: f"{run}'s {own.split('/')[0]}" for ours in targets}
      made |= Loaded({_PARAMS + ours: leaf for ours in targets}, origins)
  return made


def _check(wanted: Mapping[str, Any], found: Mapping[str, Any], source: str) -> None:
  """Refuses the state of another run unless it is ours in paths and shapes."""
  for beginning in ('params/', ''):  # Parameters come first: what else there is follows them.
    of = lambda leaves, b=beginning: {path: leaves[path] for path in leaves if path.startswith(b)}
    if difference := weights.mismatch(of(wanted), of(found)):
      path, ours, theirs = difference
      raise UserError(
        f'the run {source} of config.start has other parameters than this config: '
        f"'{path.removeprefix('params/')}' is {theirs} there and {ours} here; name a run of the "
        'same sizes, or give config.model its sizes'
      )


def _read(start: PretrainedWeights, wanted: Mapping[str, Any]) -> Params:
  """The family's parameters; from published weights, each where its first target lies."""

  def place(tree: Params) -> Params:
    leaves = leaves_by_path(tree)
    for path, leaf in leaves.items():
      for target in _targets(start, path)[:1]:
        where = getattr(wanted[target], 'sharding', None)
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return convert.tree(leaves)

  return imports.network(start, place)


def _targets(start: PretrainedWeights, path: str) -> list[str]:
  """Where a leaf of the family's tree goes in ours."""
  return [
    ours + path.removeprefix(theirs) for theirs, ours in start.paths if path.startswith(theirs)
  ]


def _as(leaf: Array, wanted: Any, source: str, path: str) -> Array:
  """A leaf in its place: a copy, as one that fills several places may share memory with none."""
  if leaf.shape != wanted.shape:
    raise UserError(
      f"'{source}' has {list(leaf.shape)} for our '{path}' of {list(wanted.shape)}: it is of "
      'another size than the config says'
    )
  return jnp.copy(jax.device_put(leaf, getattr(wanted, 'sharding', None)))
