"""The initial state of a run, and the conditions under which a run may resume.

A run resumes only with the configuration that it was started with. Fields that don't affect the
parameters may differ; any other difference must be named with `--allow_change`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vpe_jax import rng, sharding
from vpe_jax.checkpoints import convert
from vpe_jax.config import Config, did_you_mean, differences, flatten, to_dict
from vpe_jax.contracts import COUNTERS, Array, Params, State, System, UserError
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import optimizer, pretrained
from vpe_jax.training.state import first_state, merge, split_trainable

# Sections and fields that don't affect the parameters: logs, saved files, machines.
FREE = ('checkpoint', 'log', 'evals', 'sample', 'data.workers', 'mesh')
MAX_REPLICATED_BYTES = 2**30  # smaller states may stay replicated: few axes divide
INITIALIZED = 'initialized'  # origin label of randomly initialized parameters
MAX_LISTED = 8  # differences that an error lists


def check_config(
  config: Config, stored: Mapping[str, Any], workdir: str, allow_change: Sequence[str]
) -> list[str]:
  """Compares a run's stored configuration with ours.

  Returns:
    A line for each difference that is accepted.

  Raises:
    UserError: fields differ that are neither in FREE nor in `allow_change`, or `allow_change`
      names an unknown field.
  """
  known = flatten(to_dict(config)) | flatten(stored)
  sections = {field[:end] for field in known for end, dot in enumerate(field) if dot == '.'}
  for name in allow_change:
    if name not in known and name not in sections:
      raise UserError(
        f"--allow_change names '{name}', which is not a field of the config"
        f'{did_you_mean(name, known.keys() | sections)}'
      )
  refused, accepted = [], []
  for field, (old, new) in differences(config, stored).items():
    text = f'{field} was {old!r}, now {new!r}'
    allowed = any(_within(field, name) for name in (*FREE, *allow_change))
    (accepted if allowed else refused).append((field, text))
  if refused:
    more = f' and {len(refused) - MAX_LISTED} more' if len(refused) > MAX_LISTED else ''
    fields = ','.join(field for field, _ in refused)
    raise UserError(
      f'{workdir} contains a run with another config: '
      f'{"; ".join(text for _, text in refused[:MAX_LISTED])}{more}. Choose another --workdir, or, '
      f'if its parameters and stages stay the same, continue it with --allow_change={fields}'
    )
  return [text for _, text in accepted]


def check_continues(record: Mapping[str, Any], workdir: str) -> None:
  """Checks that a checkpoint is that of a training run, with an optimizer state.

  Raises:
    UserError: it has weights only: the folder is an import or a complete folder.
  """
  if not any(path.startswith('opt_state/') for path in record['leaves']):
    raise UserError(
      f'{workdir} has weights but no optimizer state (it is no training run): start a run from it, '
      f'with --config={workdir} --config.start={workdir} --workdir=ANOTHER'
    )


def check_data(
  digests: Mapping[str, str], stored: Mapping[str, str], workdir: str, allow_change: Sequence[str]
) -> list[str]:
  """Compares the data of a run with those of its checkpoint, by the digests of their parts.

  Args:
    digests: see vpe_jax.data.records.StoredSource; empty for generated data.
    stored: those of the checkpoint; empty if an earlier version saved it.
    workdir: the run's folder, for the error.
    allow_change: names of fields and sections that may differ; `data` accepts other data.

  Returns:
    A line for each accepted difference.

  Raises:
    UserError: the digests of a part that both have differ.
  """
  parts = sorted(digests.keys() & stored.keys())
  changed = [f'{p}: {stored[p]}, now {digests[p]}' for p in parts if stored[p] != digests[p]]
  if changed and 'data' not in allow_change:
    raise UserError(
      f'the training data changed since the checkpoint in {workdir} ({"; ".join(changed)}): '
      'restore them, choose another --workdir, or continue with --allow_change=data'
    )
  return changed


def abstract_state(config: Config, system: System, stage: int, mesh: jax.sharding.Mesh) -> State:
  """Shapes, dtypes and shardings of the state in one stage.

  Raises:
    UserError: the config has no such stage, a learning-rate multiplier matches no parameter, or a
      large state is not sharded over the devices.
  """
  if stage >= len(system.stages):
    names = ', '.join(config.stages)
    raise UserError(
      f'the run is in its stage {stage + 1}, but the config names only {len(system.stages)} '
      f'({names}): name the stages that the run was started with, or choose another --workdir'
    )
  # Even the key is only traced: nothing runs, so the devices of the mesh need not exist.
  optim, axes = config.optim_of(stage), system.logical_axes
  shapes = jax.eval_shape(
    lambda: first_state(system.init(rng.run_key(config.seed)), system.stages[stage], optim, axes)
  )
  optimizer.check_multipliers(optim, leaves_by_path(shapes['params']))
  replicated = sharding.replicated(mesh)

  def shard(tree: Any, axes: sharding.AxesTable = axes) -> Any:
    return sharding.param_shardings(tree, axes, mesh, config.mesh.strategy)

  trainable, _ = split_trainable(shapes['params'], system.stages[stage])
  shardings = {
    **dict.fromkeys(COUNTERS, replicated),
    'params': shard(shapes['params']),
    'opt_state': shard(shapes['opt_state'], optimizer.logical_axes(trainable, axes)),
    'ema': shard(shapes['ema']),
  }
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  if size > MAX_REPLICATED_BYTES:
    sharding.check_sharded_enough(shapes, shardings)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def fresh_state(
  system: System, abstract: State, frozen: Params, key: Array
) -> tuple[State, dict[str, str]]:
  """Creates the state of a new run, sharded over its devices.

  Args:
    system: the system to train.
    abstract: shapes and shardings of the state.
    frozen: the frozen networks.
    key: key of the run.

  Returns:
    (state, origins: path of a parameter -> description of its source).

  Raises:
    UserError: initial weights are missing or don't fit.
  """
  loaded = pretrained.load(system, abstract)
  origins = dict.fromkeys(leaves_by_path(abstract['params']), INITIALIZED)
  for prefix, origin in system.initialization.from_frozen:
    origins |= {path: origin for path in origins if path.startswith(prefix)}

  def init(key: Array, frozen: Params, loaded: dict[str, Array]) -> State:
    params = system.init(rng.stream(key, 'init'))
    params = system.inherit(params, frozen, rng.stream(key, 'inherit'))
    # The compiler removes the initialization of loaded parameters, whose result nothing reads.
    loaded_state = dict(convert.tree(loaded))
    params = merge(loaded_state.pop('params', {}), params)
    state = first_state(params, system.stages[0], system.config.optim_of(0), system.logical_axes)
    return merge(loaded_state, state)

  # On a CPU, compiling this program takes longer than running it, so it is not optimized.
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  run = jax.jit(
    init, out_shardings=shardings_of(abstract), compiler_options=options, donate_argnums=2
  )
  return run(key, frozen, loaded.leaves), origins | loaded.origins


def shardings_of(abstract: State) -> State:
  """The sharding of each leaf of a state."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _within(field: str, name: str) -> bool:
  return field == name or field.startswith(f'{name}.')
