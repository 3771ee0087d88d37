"""Flow matching: path, distribution and shift of the training times, target, weighting and loss.

t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t eps, and the velocity is v = eps - x, so an
Euler step is x_{t-dt} = x_t - dt v. Code with the opposite convention (Show-o2: 0 is noise, 1 is
data, velocity x - eps) is adapted by t = 1 - t' and v = -v'.

To add a time distribution, shift, target or weighting, write a function and add it to its table in
this file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import check, check_positive
from vpe_jax.contracts import Array

MIN_DIVISOR = 0.05  # lower bound of t and 1 - t as divisors of a prediction (arXiv 2511.13720)


@dataclasses.dataclass(frozen=True)
class FlowConfig:
  """Training settings of a flow.

  Attributes:
    time_distribution: distribution of the training times before the shift, a key of
      TIME_DISTRIBUTIONS: `logit_normal` (the sigmoid of a normal sample) or `uniform`.
    mean: mean of the normal distribution of `logit_normal`; values above 0 favour noise.
    std: standard deviation of that normal distribution.
    shift: factor s of the shift towards noise, s t / (1 + (s - 1) t); 1 is no shift.
    shift_by: a second factor of the shift, a key of SHIFTS: `constant` (1), `resolution` (grows
      with the number of image tokens, as in Show-o2 and FLUX), or `dimension`
      (sqrt(d / 4096) for latents of d values, as in RAE and VGT).
    target: prediction target of the network, a key of TARGETS: `velocity`, `data` or `noise`.
    weighting: weight of the squared error by time, a key of WEIGHTINGS: `uniform` (the error of the
      target itself), or `velocity` (the error of the velocity that the prediction implies).
  """

  time_distribution: str = 'logit_normal'
  mean: float = 0.0
  std: float = 1.0
  shift: float = 1.0
  shift_by: str = 'constant'
  target: str = 'velocity'
  weighting: str = 'uniform'

  def __post_init__(self) -> None:
    tables = {
      'time_distribution': TIME_DISTRIBUTIONS,
      'shift_by': SHIFTS,
      'target': TARGETS,
      'weighting': WEIGHTINGS,
    }
    for name, table in tables.items():
      check(self, '', name, getattr(self, name) in table, f'one of {", ".join(table)}')
    check(self, '', 'mean', math.isfinite(self.mean), 'a finite number')
    check_positive(self, '', 'std', 'shift')

  def total_shift(self, tokens: int, dimension: int) -> float:
    """The factor s of the shift of times.

    Args:
      tokens: number of image tokens of one image.
      dimension: number of values in the latents of one image.
    """
    return self.shift * SHIFTS[self.shift_by](tokens, dimension)


def path(data: Array, noise: Array, time: Array) -> Array:
  """x_t [B, ...] at times [B], between data and noise [B, ...]."""
  t = _over(time, data)
  return (1.0 - t) * data + t * noise


def velocity(data: Array, noise: Array) -> Array:
  """The velocity eps - x of the path."""
  return noise - data


def shift_time(time: Array, shift: float | Array) -> Array:
  """Shifts times towards noise: s t / (1 + (s - 1) t)."""
  return shift * time / (1.0 + (shift - 1.0) * time)


def token_shift(tokens: int) -> float:
  """Show-o2's shift by number of image tokens, from its released transport code.

  It is e^mu, where mu is linear in the number of tokens: 0.5 at 256 and 1.15 at 4096.
  """
  slope = (1.15 - 0.5) / (4096 - 256)
  return math.exp(0.5 + slope * (tokens - 256))


def dimension_shift(dimension: int) -> float:
  """The shift for latents of a dimension: sqrt(dimension / 4096) (RAE, arXiv 2510.11690)."""
  return math.sqrt(dimension / 4096)


def sample_time(key: Array, flow: FlowConfig, shift: float) -> Array:
  """Samples a training time, shifted by `shift`; float32 scalar."""
  return shift_time(TIME_DISTRIBUTIONS[flow.time_distribution](key, flow), shift)


def noised(
  data: Array, flow: FlowConfig, key: Array, example: Array, tokens: int
) -> tuple[Array, Array, Array]:
  """The network's input and target for a training batch.

  Args:
    data: [B, ...].
    flow: time distribution, shift and target.
    key: the run's key.
    example: example indices [B], which key each example's time and noise.
    tokens: number of image tokens of one image.

  Returns:
    x_t [B, ...], times [B] and targets [B, ...], float32.
  """
  data = data.astype(jnp.float32)
  shift = flow.total_shift(tokens, math.prod(data.shape[1:]))
  time = rng_lib.per_example(lambda k: sample_time(k, flow, shift), key, 'time', example)
  normal = lambda k: jax.random.normal(k, data.shape[1:])
  noise = rng_lib.per_example(normal, key, 'noise', example)
  return path(data, noise, time), time, TARGETS[flow.target].of(data, noise)


def loss(flow: FlowConfig, prediction: Array, target: Array, time: Array) -> Array:
  """The weighted squared error, summed over a batch; float32 scalar.

  Args:
    flow: target and weighting.
    prediction: the network's output [B, ...], any float dtype.
    target: [B, ...] from `noised`; its size is the count of the LossTerm.
    time: [B].
  """
  weight = WEIGHTINGS[flow.weighting](flow, time)
  if weight is None:
    return squared_error(prediction, target)
  error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.sum(_over(weight, error) * jnp.square(error))


def squared_error(prediction: Array, target: Array) -> Array:
  """The summed squared error, a float32 scalar; its count is `target.size`."""
  error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.sum(jnp.square(error))


def implied_velocity(flow: FlowConfig, prediction: Array, x: Array, time: Array) -> Array:
  """The velocity that a network's prediction implies, for a sampler.

  Args:
    flow: prediction target of the network.
    prediction: the network's output [B, ...].
    x: x_t [B, ...].
    time: [B], or a scalar.
  """
  if flow.target == 'velocity':
    return prediction
  t = _over(jnp.broadcast_to(time, x.shape[:1]), x)
  return TARGETS[flow.target].velocity(prediction.astype(jnp.float32), x, t)


def _over(time: Array, data: Array) -> Array:
  return time.reshape(time.shape[0], *([1] * (data.ndim - 1))).astype(jnp.float32)


def _logit_normal(key: Array, flow: FlowConfig) -> Array:
  return jax.nn.sigmoid(flow.mean + flow.std * jax.random.normal(key))


def _uniform(key: Array, flow: FlowConfig) -> Array:
  del flow
  return jax.random.uniform(key)


TIME_DISTRIBUTIONS: dict[str, Callable[[Array, FlowConfig], Array]] = {
  'logit_normal': _logit_normal,
  'uniform': _uniform,
}
SHIFTS: dict[str, Callable[[int, int], float]] = {
  'constant': lambda tokens, dimension: 1.0,
  'resolution': lambda tokens, dimension: token_shift(tokens),
  'dimension': lambda tokens, dimension: dimension_shift(dimension),
}


@dataclasses.dataclass(frozen=True)
class _Target:
  """A quantity that a network may predict.

  Attributes:
    of: data and noise -> the quantity.
    velocity: prediction, x_t and t -> the velocity.
    scale: t -> ratio of the velocity's error to the prediction's error.
  """

  of: Callable[[Array, Array], Array]
  velocity: Callable[[Array, Array, Array], Array]
  scale: Callable[[Array], Array]


TARGETS = {
  'velocity': _Target(velocity, lambda prediction, x, t: prediction, jnp.ones_like),
  'data': _Target(
    lambda data, noise: data,
    lambda prediction, x, t: (x - prediction) / jnp.maximum(t, MIN_DIVISOR),
    lambda t: 1.0 / jnp.maximum(t, MIN_DIVISOR),
  ),
  'noise': _Target(
    lambda data, noise: noise,
    lambda prediction, x, t: (prediction - x) / jnp.maximum(1.0 - t, MIN_DIVISOR),
    lambda t: 1.0 / jnp.maximum(1.0 - t, MIN_DIVISOR),
  ),
}


# Weights [B] at times [B]; None is weight 1 at every time.
WEIGHTINGS: dict[str, Callable[[FlowConfig, Array], Array | None]] = {
  'uniform': lambda flow, time: None,
  'velocity': lambda flow, time: jnp.square(TARGETS[flow.target].scale(time)),
}
