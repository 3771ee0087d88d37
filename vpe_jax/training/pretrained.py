"""Parameters that a run starts from, put where they go: published weights, or an earlier run's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from vpe_jax.checkpoints import convert, converted, weights
from vpe_jax.config import Config, differences
from vpe_jax.contracts import RUN, Array, Params, Start, UserError
from vpe_jax.sharding import by_path
from vpe_jax.training.state import State

_CARRIED = ('params/', 'opt_state/', 'ema/', 'examples_seen')  # of the state of a run
_MEANING = ('data.tokenizer', 'model.weights.', 'model.visual_prompt.', 'model.siglip_vq')
_TREES = '(?:params|opt_state/mu|opt_state/nu|ema)/'  # where a parameter's path stands behind


def load(starts: Sequence[Start], abstract: Params) -> dict[str, Array]:
  """Reads the weights that a system starts from.

  Args:
    starts: see vpe_jax.contracts.Start.
    abstract: the system's parameters, with their shardings.

  Returns:
    Path in the state -> array, for every parameter that the weights fill, sharded as `abstract` is.

  Raises:
    UserError: weights are missing, don't fit, or are of another size.
  """
  wanted, found = by_path(abstract), {}
  for start in starts:
    for path, leaf in by_path(_read(start, wanted)).items():
      for target in _targets(start, path):
        found[f'params/{target}'] = _as(leaf, wanted[target], start.source, target)
  return found


def from_run(
  config: Config, abstract: State, added: Sequence[str] = (), grown: Sequence[Start] = ()
) -> dict[str, Array]:
  """Reads what a new run takes from the run that `config.start` names: its newest good checkpoint.

  With `config.start_weights` of `state` that is all of its state but for its steps: parameters,
  optimizer, average, and where it was in the data. Else the parameters alone.

  Args:
    config: says which run, and which of its weights.
    abstract: our first state, with its shardings.
    added: regular expressions over the paths of parameters that the other run may lack: they are
      drawn.
    grown: what parameters start from that the other run lacks, where its parameters are taken.

  Returns:
    Path in the state -> array, sharded as `abstract` is; all but what is added.

  Raises:
    UserError: there is no such run, or its parameters are not ours in paths and shapes.
  """
  carries = config.start_weights == 'state'
  if carries:
    found, said = weights.read_run(config.start, _CARRIED)
    theirs = said['config']
  else:
    params, metadata = weights.load_run(config.start, config.start_weights)
    found, theirs = by_path({'params': params}), weights.config_of(metadata, config.start)
    found |= _grown(grown, found, abstract['params'])
  for line in other_meanings(config, theirs):
    logging.warning('%s', line)

  def is_wanted(path: str) -> bool:
    fresh = any(re.match(f'{_TREES}(?:{pattern})', path) for pattern in added)
    return path.startswith(_CARRIED if carries else 'params/') and (path in found or not fresh)

  wanted = {path: leaf for path, leaf in by_path(abstract).items() if is_wanted(path)}
  _check(wanted, found, config.start)
  return {path: _as(leaf, wanted[path], config.start, path) for path, leaf in found.items()}


def other_meanings(config: Config, stored: Mapping[str, Any]) -> list[str]:
  """Lines on what a run and the one that it starts from read with different networks.

  Words, codes and latents are numbers, whose shapes don't say what they stand for.
  """
  return [
    f'{config.start} was trained with {field}={theirs}, and this run has {ours}: unless both name '
    'the same, what it learned means something else here'
    for field, (theirs, ours) in differences(config, stored).items()
    if field.startswith(_MEANING)
  ]


def _grown(starts: Sequence[Start], found: Mapping[str, Any], abstract: Params) -> dict[str, Any]:
  """What a run lacks, by path in the state: published weights, or copies of its own leaves."""
  made = {}
  for start in starts:
    if any(path.startswith(f'params/{ours}') for _, ours in start.paths for path in found):
      continue
    if start.family != RUN:
      made |= load([start], abstract)
      continue
    for path, leaf in found.items():
      made |= {f'params/{ours}': leaf for ours in _targets(start, path.removeprefix('params/'))}
  return made


def _check(wanted: Mapping[str, Any], found: Mapping[str, Any], source: str) -> None:
  """Refuses the state of another run unless it is ours in paths and shapes."""
  for beginning in ('params/', ''):  # Parameters come first: what else there is follows them.
    of = lambda leaves, b=beginning: {path: leaves[path] for path in leaves if path.startswith(b)}
    if difference := weights.mismatch(of(wanted), of(found)):
      path, ours, theirs = difference
      raise UserError(
        f'config.start={source} has other parameters than this config: '
        f"'{path.removeprefix('params/')}' is {theirs} there and {ours} here; name a run of the "
        'same sizes, or give config.model its sizes'
      )


def _read(start: Start, wanted: Mapping[str, Any]) -> Params:
  """The family's parameters; from published weights, each where its first target lies."""

  def place(tree: Params) -> Params:
    leaves = by_path(tree)
    for path, leaf in leaves.items():
      for target in _targets(start, path)[:1]:
        where = getattr(wanted[target], 'sharding', None)
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return convert.tree(leaves)

  return converted.network(start, place)


def _targets(start: Start, path: str) -> list[str]:
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
