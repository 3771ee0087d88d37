"""Optimizers on top of optax (AdamW, Adafactor, Muon), learning rates and their multipliers.

The state of an optimizer is a plain nested dict, which checkpoints store by path. It has `count`
(number of updates) and one tree per kind of moment, under the paths of the parameters. Clipping,
weight decay and the learning rate, a function of the stage's step, have no state.

  adamw      mu and nu of every parameter
  adafactor  v_row and v_col of large matrices, v of every other parameter
  muon       mu of every parameter, nu of parameters that are not matrices inside the network

Adafactor and Muon treat a parameter as a matrix: rows are its input, columns its output. The names
in the system's `logical_axes` determine which axes are rows. Each stacked layer is a separate
matrix.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vpe_jax import sharding
from vpe_jax.checkpoints import convert
from vpe_jax.config import OptimConfig
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.sharding import AxesTable, leaves_by_path

OptState = dict[str, Any]

UNDECAYED = ('bias', 'scale')  # last path component of leaves without weight decay
MIN_FACTORED = 128  # minimum rows and columns of a matrix that Adafactor factors
MUON_RMS = 0.2  # root mean square of Muon's updates, similar to AdamW's (arXiv 2502.16982)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the reference implementation of Muon
# Axes of embedding tables and of input and output projections, which Muon updates with AdamW.
_OUTER = {sharding.VOCAB, sharding.CODES, sharding.POSITION, sharding.FEATURES}
# Pairs (axis, previous axis) on the same side of a matrix.
_SAME_SIDE = {
  (sharding.HEAD, sharding.HEADS),
  (sharding.HEAD, sharding.KV_HEADS),
  (sharding.KERNEL, sharding.KERNEL),
  (sharding.CONV_IN, sharding.KERNEL),
}


def init(trainable: Params, config: OptimConfig | None = None, axes: AxesTable = ()) -> OptState:
  """Initializes the optimizer state of the trainable leaves.

  Args:
    trainable: nested dict of parameters.
    config: settings of one stage (None: AdamW with its defaults).
    axes: the system's `logical_axes`; without any, all two-dimensional leaves are matrices.
  """
  config = config or OptimConfig()
  return OPTIMIZERS[config.name].init(trainable, config, axes)


def update(
  gradient: Params,
  opt_state: OptState,
  trainable: Params,
  stage_step: Array,
  config: OptimConfig,
  axes: AxesTable = (),
) -> tuple[Params, OptState]:
  """Applies a clipped gradient; returns the new trainable leaves and optimizer state.

  Args:
    gradient: same structure as `trainable`.
    opt_state: from `init` or the previous step.
    trainable: nested dict of parameters.
    stage_step: step of the stage, from 0.
    config: settings of one stage.
    axes: see `init`.
  """
  optimizer = OPTIMIZERS[config.name]
  direction, opt_state = optimizer.direction(gradient, opt_state, trainable, config, axes)
  if config.weight_decay:
    decay = optax.add_decayed_weights(config.weight_decay, mask=_decayed)
    direction, _ = decay.update(direction, decay.init(trainable), trainable)
  rate = learning_rate(stage_step, config)

  def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
    factor = multiplier(jax.tree_util.keystr(path, simple=True, separator='/'), config)
    return -(rate if factor == 1.0 else factor * rate) * leaf

  direction = jax.tree_util.tree_map_with_path(scaled, direction)
  return optax.apply_updates(trainable, direction), opt_state


def learning_rate(stage_step: Array | int, config: OptimConfig) -> Array:
  """The learning rate at a step of the stage (from 0).

  Warm-up reaches `lr` at step `warmup - 1`. `cosine` and `linear` decay from step `warmup` to
  `lr_end` at step `decay_steps`.

  Raises:
    ValueError: the schedule decays and `decay_steps` is 0 (see Config.optim_of).
  """
  step = jnp.asarray(stage_step, jnp.float32)
  ramp = (step + 1.0) / max(config.warmup, 1)
  return SCHEDULES[config.schedule](step, config) * jnp.minimum(ramp, 1.0)


def multiplier(path: str, config: OptimConfig) -> float:
  """The multiplier of a parameter's learning rate."""
  factors = (factor for pattern, factor in config.factors if re.match(pattern, path))
  return next(factors, 1.0)


def check_multipliers(config: OptimConfig, paths: Iterable[str]) -> None:
  """Checks that each multiplier matches a parameter.

  Args:
    config: settings of one stage.
    paths: paths of all parameters, trainable or not.

  Raises:
    UserError: a multiplier matches no parameter; names its pattern.
  """
  paths = list(paths)
  for pattern, _ in config.factors:
    if not any(re.match(pattern, path) for path in paths):
      heads = ', '.join(sorted({path.split('/')[0] for path in paths}))
      raise UserError(
        f"config.optim.multipliers names '{pattern}', which matches no parameter; "
        f'paths begin with: {heads}'
      )


def logical_axes(trainable: Params, axes: AxesTable) -> AxesTable:
  """Axis names of the optimizer's state: those of parameters and of factored moments.

  Args:
    trainable: nested dict of parameters, or of their shapes.
    axes: the system's `logical_axes`.
  """
  rows = []
  for path, leaf in leaves_by_path(trainable).items():
    matrix = _factored(path, leaf, axes)
    if matrix is not None:
      # As in optax, `v_row` is the mean over the larger side (over columns at a tie).
      short, long = matrix.names if matrix.rows <= matrix.columns else matrix.names[::-1]
      layers = (sharding.LAYERS,) * matrix.stacked
      rows.append((f'v_row/{re.escape(path)}', (*layers, short)))
      rows.append((f'v_col/{re.escape(path)}', (*layers, long)))
  return (*rows, *axes)


def clip(gradient: Params, norm: Array, limit: float) -> Params:
  """Scales the gradient so that its global norm is at most `limit` (0: no limit)."""
  if not limit:
    return gradient
  scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
  return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradient)


def _decayed(params: Params) -> Params:
  def is_decayed(path: tuple[Any, ...], _: Array) -> bool:
    return path[-1].key not in UNDECAYED

  return jax.tree_util.tree_map_with_path(is_decayed, params)


# Schedules: rate after warm-up at a step of the stage (float32).


def _constant(step: Array, config: OptimConfig) -> float:
  del step
  return config.lr


def _cosine(step: Array, config: OptimConfig) -> Array:
  decay = optax.cosine_decay_schedule(config.lr, _decay_length(config), config.lr_end / config.lr)
  return decay(jnp.maximum(step - config.warmup, 0.0))


def _linear(step: Array, config: OptimConfig) -> Array:
  decay = optax.linear_schedule(config.lr, config.lr_end, _decay_length(config), config.warmup)
  return decay(step)


def _rsqrt(step: Array, config: OptimConfig) -> Array:
  first = max(config.warmup, 1)
  rate = config.lr * jnp.sqrt(first / jnp.maximum(step + 1.0, first))
  return jnp.maximum(rate, config.lr_end)


def _decay_length(config: OptimConfig) -> int:
  if not config.decay_steps:
    raise ValueError(f'schedule {config.schedule} without decay_steps: use Config.optim_of')
  return max(config.decay_steps - config.warmup, 1)


SCHEDULES: dict[str, Callable[[Array, OptimConfig], Array | float]] = {
  'constant': _constant,
  'cosine': _cosine,
  'linear': _linear,
  'rsqrt': _rsqrt,
}


# Parameters as matrices.


@dataclasses.dataclass(frozen=True)
class _Matrix:
  """A parameter as a matrix, or as one per stacked layer.

  Attributes:
    stacked: whether the first axis is that of stacked layers.
    sides: axes of the rows, and axes of the columns.
    rows: number of rows.
    columns: number of columns.
    names: axis names of the rows and of the columns.
  """

  stacked: bool
  sides: tuple[tuple[int, ...], tuple[int, ...]]
  rows: int
  columns: int
  names: tuple[str | None, str | None]

  def of(self, leaf: Array) -> Array:
    """The leaf [(layers), rows, columns]."""
    return leaf.reshape(*leaf.shape[: self.stacked], self.rows, self.columns)


def _matrix(path: str, leaf: Any, axes: AxesTable) -> _Matrix | None:
  """A parameter as a matrix; None if its axes don't form exactly two sides."""
  names = sharding.axis_names(path, tuple(leaf.shape), axes)
  stacked = _is_stacked(names)
  sides: list[list[int]] = []
  for axis in range(int(stacked), len(names)):
    if sides and (names[axis], names[axis - 1]) in _SAME_SIDE:
      sides[-1].append(axis)
    else:
      sides.append([axis])
  if len(sides) != 2:
    return None
  rows, columns = (math.prod(leaf.shape[axis] for axis in side) for side in sides)
  # A side of (heads, head width) has the name of the heads, which tensor parallelism shards; a side
  # of (kernel, kernel, channels) has that of the channels.
  name_of = lambda side: names[side[-1]] if names[side[0]] == sharding.KERNEL else names[side[0]]
  return _Matrix(stacked, tuple(map(tuple, sides)), rows, columns, tuple(map(name_of, sides)))


def _is_stacked(names: tuple[str | None, ...]) -> bool:
  return bool(names) and names[0] == sharding.LAYERS


def _factored(path: str, leaf: Any, axes: AxesTable) -> _Matrix | None:
  """The matrix of a parameter whose second moments Adafactor factors."""
  matrix = _matrix(path, leaf, axes)
  return matrix if matrix and min(matrix.rows, matrix.columns) >= MIN_FACTORED else None


# AdamW.


def _init_adamw(trainable: Params, config: OptimConfig, axes: AxesTable) -> OptState:
  del axes
  return _adam(config).init(trainable)._asdict()


def _adamw_direction(
  gradient: Params, state: OptState, trainable: Params, config: OptimConfig, axes: AxesTable
) -> tuple[Params, OptState]:
  del trainable, axes
  direction, moments = _adam(config).update(gradient, optax.ScaleByAdamState(**state))
  return direction, moments._asdict()


def _adam(config: OptimConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)


# Adafactor: optax clips and scales each leaf by its own root mean square. The layers of a stacked
# leaf are updated as separate leaves, so a scanned network trains like an unrolled one.


def _adafactor(factored: bool) -> optax.GradientTransformation:
  return optax.adafactor(factored=factored, min_dim_size_to_factor=MIN_FACTORED)


def _init_adafactor(trainable: Params, config: OptimConfig, axes: AxesTable) -> OptState:
  del config
  memory: dict[str, dict[str, Array]] = {'v_row': {}, 'v_col': {}, 'v': {}}
  for path, leaf in leaves_by_path(trainable).items():
    matrix = _factored(path, leaf, axes)
    if matrix is None:
      memory['v'][path] = jnp.zeros_like(leaf)
      continue
    view = matrix.of(leaf)
    start = lambda view: _adafactor(True).init(view)[0]
    state = (jax.vmap(start) if matrix.stacked else start)(view)
    memory['v_row'][path], memory['v_col'][path] = state.v_row, state.v_col
  trees = {name: convert.tree(leaves) for name, leaves in memory.items()}
  return {'count': jnp.zeros((), jnp.int32), **trees}


def _adafactor_direction(
  gradient: Params, state: OptState, trainable: Params, config: OptimConfig, axes: AxesTable
) -> tuple[Params, OptState]:
  del config
  params, count = leaves_by_path(trainable), state['count']
  memory = {name: leaves_by_path(state[name]) for name in ('v_row', 'v_col', 'v')}
  direction, after = {}, {name: {} for name in memory}
  for path, leaf in leaves_by_path(gradient).items():
    param, matrix = params[path], _factored(path, leaf, axes)
    names = ('v',) if matrix is None else ('v_row', 'v_col')
    stacked = _is_stacked(sharding.axis_names(path, leaf.shape, axes))
    view = (lambda leaf: leaf) if matrix is None else matrix.of

    def step(
      gradient: Array, param: Array, *moments: Array, names: tuple[str, ...] = names
    ) -> tuple[Array, tuple[Array, ...]]:
      rule = _adafactor(factored=len(names) == 2)
      empty, *others = rule.init(param)
      before = empty._replace(count=count, **dict(zip(names, moments)))
      change, (moved, *_) = rule.update(gradient, (before, *others), param)
      return -change, tuple(getattr(moved, name) for name in names)

    run = jax.vmap(step) if stacked else step
    moments = [memory[name][path] for name in names]
    change, moments = run(view(leaf), view(param), *moments)
    direction[path] = change.reshape(leaf.shape)
    for name, moment in zip(names, moments):
      after[name][path] = moment
  trees = {name: convert.tree(leaves) for name, leaves in after.items()}
  return convert.tree(direction), {'count': optax.safe_increment(count), **trees}


# Muon.


def _inner(params: Mapping[str, Any], axes: AxesTable) -> dict[str, _Matrix]:
  """The matrices inside the network by path, which Muon updates."""
  matrices = {path: _matrix(path, leaf, axes) for path, leaf in params.items()}
  return {
    path: matrix
    for path, matrix in matrices.items()
    if matrix is not None and not _OUTER.intersection(matrix.names)
  }


def _init_muon(trainable: Params, config: OptimConfig, axes: AxesTable) -> OptState:
  moments, params = _init_adamw(trainable, config, axes), leaves_by_path(trainable)
  inner = _inner(params, axes)
  others = {path: leaf for path, leaf in leaves_by_path(moments['nu']).items() if path not in inner}
  return moments | {'nu': convert.tree(others)}


def _muon_direction(
  gradient: Params, state: OptState, trainable: Params, config: OptimConfig, axes: AxesTable
) -> tuple[Params, OptState]:
  del trainable
  gradients, mu, count = leaves_by_path(gradient), leaves_by_path(state['mu']), state['count']
  inner = _inner(gradients, axes)
  matrices = lambda leaves: {path: leaves[path] for path in inner}
  others = lambda leaves: {path: leaf for path, leaf in leaves.items() if path not in inner}
  muon = optax.contrib.scale_by_muon(
    NEWTON_SCHULZ,
    beta=config.momentum,
    eps=config.eps,
    mu_dtype=config.mu_dtype,
    weight_dimension_numbers={
      path: optax.contrib.MuonDimensionNumbers(*matrix.sides) for path, matrix in inner.items()
    },
  )
  before = optax.contrib.MuonState(count, matrices(mu), jnp.asarray(NEWTON_SCHULZ))
  orthogonal, momentum = muon.update(matrices(gradients), before)
  scale = lambda matrix: MUON_RMS * math.sqrt(max(matrix.rows, matrix.columns))
  direction = {path: scale(inner[path]) * leaf for path, leaf in orthogonal.items()}
  before = optax.ScaleByAdamState(count, others(mu), leaves_by_path(state['nu']))
  rest, moments = _adam(config).update(others(gradients), before)
  return convert.tree(direction | rest), {
    'count': moments.count,
    'mu': convert.tree(momentum.mu | moments.mu),
    'nu': convert.tree(moments.nu),
  }


@dataclasses.dataclass(frozen=True)
class _Optimizer:
  """An optimizer without its learning rate.

  Attributes:
    init: (trainable parameters, settings, axes) -> state.
    direction: (gradient, state, trainable parameters, settings, axes) -> (direction, state). The
      update is the negative direction times the learning rate.
  """

  init: Callable[[Params, OptimConfig, AxesTable], OptState]
  direction: Callable[[Params, OptState, Params, OptimConfig, AxesTable], tuple[Params, OptState]]


OPTIMIZERS = {
  'adamw': _Optimizer(_init_adamw, _adamw_direction),
  'adafactor': _Optimizer(_init_adafactor, _adafactor_direction),
  'muon': _Optimizer(_init_muon, _muon_direction),
}
