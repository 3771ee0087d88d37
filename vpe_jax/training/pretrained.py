"""Loads initial parameters of a run from parent runs and from published weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from vpe_jax.checkpoints import convert, imports, weights
from vpe_jax.config import Config, did_you_mean, differences, flatten, to_dict
from vpe_jax.contracts import PARENT, Array, Params, PretrainedWeights, State, System, UserError
from vpe_jax.sharding import leaves_by_path

_PARAMS = 'params/'
_INHERITED = (_PARAMS, 'opt_state/', 'ema/', 'examples_seen')  # with config.start_weights=state
_TREES = '(?:params|opt_state/[a-z_]+|ema)/'  # prefixes of parameter paths in the state

PathFilter = Callable[[str], bool]  # predicate over parameter paths


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Parameters loaded rather than initialized.

  Attributes:
    leaves: path in the state -> array, sharded as the state is.
    origins: path of a parameter -> description of its source.
  """

  leaves: dict[str, Array]
  origins: dict[str, str]

  def __or__(self, other: Loaded) -> Loaded:
    return Loaded(self.leaves | other.leaves, self.origins | other.origins)


def load(system: System, abstract: State) -> Loaded:
  """Loads the initial parameters of a new run from its parent runs, else from published weights.

  Args:
    system: its config names the parent runs, its `initialization` the published weights.
    abstract: shapes and shardings of the first state.

  Raises:
    UserError: runs or weights are missing, don't fit, or have other sizes.
  """
  runs = system.config.parents
  _check_groups(runs, abstract['params'])
  groups = tuple(filter(None, runs))
  loaded = Loaded({}, {})
  if '' not in runs:
    is_rest = lambda path: not path.startswith(groups)
    loaded = _load_published(system.initialization.pretrained, abstract['params'], is_rest)
  for group, run in runs.items():
    in_group = lambda path, g=group: path.startswith(g) if g else not path.startswith(groups)
    loaded |= _load_run(system, run, abstract, in_group)
  return loaded


def _check_groups(runs: Mapping[str, str], abstract: Params) -> None:
  known = [f'{group}/' for group in abstract]
  for group in filter(None, runs):
    if group not in known:
      raise UserError(
        f'config.start takes {group} from {runs[group]}, and no parameter path begins with it'
        f'{did_you_mean(group, known)}'
      )


def _load_published(
  sources: Sequence[PretrainedWeights], abstract: Params, select: PathFilter
) -> Loaded:
  """Loads published weights into the selected parameters."""
  targets, leaves, origins = leaves_by_path(abstract), {}, {}
  for source in sources:
    for path, leaf in leaves_by_path(_read(source, targets)).items():
      for target in filter(select, _target_paths(source, path)):
        leaves[_PARAMS + target] = _to_devices(leaf, targets[target], source.source, target)
        origins[target] = source.source
  return Loaded(leaves, origins)


def _load_run(system: System, run: str, abstract: State, select: PathFilter) -> Loaded:
  """Loads leaves from the newest intact checkpoint of a parent run, or from a weight file.

  With `config.start_weights=state`, loads the whole state except the step counters: parameters,
  optimizer state, EMA and the position in the data. Otherwise, loads only parameters.

  Args:
    system: its `initialization` names parameters that the parent run may lack.
    run: the parent run's workdir, `assets:NAME` or a weight file.
    abstract: shapes and shardings of our first state.
    select: selects the parameters to load from this run.

  Raises:
    UserError: the run or file doesn't exist, its parameters have other paths or shapes, its
      optimizer state is that of another optimizer, or a file should provide the whole state.
  """
  config, grown = system.config, Loaded({}, {})
  kind, is_file = config.start_weights, weights.is_file(run)
  whole_state = kind == 'state'
  if whole_state and is_file:
    raise UserError(
      f'config.start_weights is state, but {run} has only parameters: leave config.start_weights '
      'out, or name the run that the file was exported from'
    )
  if whole_state:
    leaves, record = weights.read_run(run, _INHERITED)
    parent_config = record['config']
    _check_optimizer(leaves, leaves_by_path(abstract), run)
  else:
    params, metadata = weights.load(run) if is_file else weights.load_run(run, kind)
    kind = metadata.get('weights', kind)  # A file has weights of one kind.
    leaves = leaves_by_path({'params': params})
    parent_config = weights.config_of(metadata, run)
    grown = _grow(system.initialization.grown, leaves, abstract['params'], run)
  for line in encoding_differences(config, run, parent_config):
    logging.warning('%s', line)
  leaves = {path: x for path, x in (leaves | grown.leaves).items() if _is_selected(path, select)}

  def is_expected(path: str) -> bool:
    optional = any(re.match(f'{_TREES}(?:{p})', path) for p in system.initialization.optional)
    inherited = path.startswith(_INHERITED if whole_state else _PARAMS)
    return inherited and _is_selected(path, select) and (path in leaves or not optional)

  expected = {path: leaf for path, leaf in leaves_by_path(abstract).items() if is_expected(path)}
  _check_same_shapes(expected, leaves, run)
  loaded = {path: _to_devices(leaf, expected[path], run, path) for path, leaf in leaves.items()}
  params = [path.removeprefix(_PARAMS) for path in loaded if path.startswith(_PARAMS)]
  origin = f'{run} ({kind})'
  return Loaded(loaded, {path: grown.origins.get(path, origin) for path in params})


def _check_optimizer(theirs: Mapping[str, Any], ours: Mapping[str, Any], run: str) -> None:
  """Checks that the optimizer state of a parent run has the same trees as ours."""
  trees = lambda leaves: {path.split('/')[1] for path in leaves if path.startswith('opt_state/')}
  if trees(theirs) != trees(ours):
    raise UserError(
      f'config.start_weights is state, but {run} has the state of another optimizer '
      f'({", ".join(sorted(trees(theirs)))}; ours has {", ".join(sorted(trees(ours)))}): set '
      'config.optim.name as in that run, or config.start_weights=ema'
    )


def _is_selected(path: str, select: PathFilter) -> bool:
  """Whether a leaf of the state belongs to a selected parameter, or to no parameter at all."""
  parameter = re.sub(f'^{_TREES}', '', path)
  return parameter == path or select(parameter)


def encoding_differences(config: Config, run: str, stored: Mapping[str, Any]) -> list[str]:
  """Lines about tokenizers and codecs that differ between a run and its parent run.

  Token ids, codes and latents of different networks have the same shapes, so no other check
  notices that their meaning has changed.

  Args:
    config: our configuration.
    run: name of the parent run.
    stored: configuration of the parent run.
  """
  fields = flatten(to_dict(config)).keys() | flatten(stored).keys()
  # Codecs are the sections of the model that have a kind.
  codecs = tuple(f.removesuffix('kind') for f in fields if re.fullmatch(r'model\.\w+\.kind', f))
  changes = differences(config, stored)
  # Fields of codecs of different kinds are not comparable, so only their kinds are listed.
  other_kinds = tuple(field.removesuffix('kind') for field in changes if field.endswith('.kind'))
  return [
    f'{run} was trained with {field}={theirs}, and this run has {ours}: unless both name the same '
    'network, the loaded parameters get token ids, codes or latents of another meaning'
    for field, (theirs, ours) in changes.items()
    if field.startswith(('data.tokenizer', *codecs))
    and not field.endswith('weights_dtype')
    and (field.endswith('.kind') or not field.startswith(other_kinds))
  ]


def _grow(
  sources: Sequence[PretrainedWeights], leaves: Mapping[str, Any], abstract: Params, run: str
) -> Loaded:
  """Leaves that the parent run lacks: published weights, or copies of its own leaves."""
  grown = Loaded({}, {})
  for source in sources:
    if any(path.startswith(f'{_PARAMS}{ours}') for _, ours in source.paths for path in leaves):
      continue
    if source.family != PARENT:
      grown |= _load_published([source], abstract, lambda path: True)
      continue
    for path, leaf in leaves.items():
      parent_path = path.removeprefix(_PARAMS)
      targets = _target_paths(source, parent_path)
      origins = {target: f"{run}'s {parent_path.split('/')[0]}" for target in targets}
      grown |= Loaded({_PARAMS + target: leaf for target in targets}, origins)
  return grown


def _check_same_shapes(expected: Mapping[str, Any], actual: Mapping[str, Any], source: str) -> None:
  """Checks that leaves of a parent run have our paths and shapes; parameters are compared first."""
  for prefix in (_PARAMS, ''):
    under = lambda leaves, p=prefix: {path: leaves[path] for path in leaves if path.startswith(p)}
    if difference := weights.mismatch(under(expected), under(actual)):
      path, ours, theirs = difference
      raise UserError(
        f'{source} of config.start has other parameters than this config: '
        f"'{path.removeprefix(_PARAMS)}' is {theirs} there and {ours} here; name weights of the "
        'same sizes, or give config.model its sizes'
      )


def _read(source: PretrainedWeights, targets: Mapping[str, Any]) -> Params:
  """Reads a family's parameters, each sharded as the first of our parameters that it fills."""

  def shard(tree: Params) -> Params:
    leaves = leaves_by_path(tree)
    for path, leaf in leaves.items():
      for target in _target_paths(source, path)[:1]:
        sharding = targets[target].sharding
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return convert.tree(leaves)

  return imports.network(source, shard)


def _target_paths(source: PretrainedWeights, path: str) -> list[str]:
  """Paths of our parameters that a leaf of the family's tree fills."""
  return [
    ours + path.removeprefix(theirs) for theirs, ours in source.paths if path.startswith(theirs)
  ]


def _to_devices(leaf: Array, target: jax.ShapeDtypeStruct, source: str, path: str) -> Array:
  """Copies a leaf to the devices of its target; targets with the same source share no memory."""
  if leaf.shape != target.shape:
    raise UserError(
      f"'{source}' has {list(leaf.shape)} for our '{path}' of {list(target.shape)}: name "
      'weights of the sizes in the config'
    )
  return jnp.copy(jax.device_put(leaf, target.sharding))
