"""Flow matching: path, time law, shift, target and loss, all of it.

t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t eps, and the velocity is v = eps - x, so an
Euler step is x_{t-dt} = x_t - dt v. Show-o2's clock runs the other way (0 noise, 1 data, velocity
x - eps): `time = 1 - clock` and `velocity = -theirs`, which systems/t2i.py applies.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.contracts import Array


def path(data: Array, noise: Array, time: Array) -> Array:
  """x_t for times [B]."""
  t = _over(time, data)
  return (1.0 - t) * data + t * noise


def target(data: Array, noise: Array) -> Array:
  """The velocity of the path."""
  return noise - data


def shift_time(time: Array, shift: float | Array) -> Array:
  """Moves times towards noise: s t / (1 + (s - 1) t)."""
  return shift * time / (1.0 + (shift - 1.0) * time)


def token_shift(tokens: int) -> float:
  """Show-o2's shift for a picture of so many tokens: e^mu, mu linear from .5 at 256 to 1.15 at 4096
  (released transport code; reference of the time law below)."""
  slope = (1.15 - 0.5) / (4096 - 256)
  return math.exp(0.5 + slope * (tokens - 256))


def sample_time(key: Array, shift: float) -> Array:
  """One training time: a logit-normal draw (mean 0, deviation 1), shifted; float32 scalar."""
  return shift_time(jax.nn.sigmoid(jax.random.normal(key)), shift)


def noised(data: Array, shift: float, key: Array, example: Array) -> tuple[Array, Array, Array]:
  """What a network sees of a batch in training, and what it is to say.

  Args:
    data: [B, ...].
    shift: of the times, see `sample_time`.
    key: of the run.
    example: indices [B], which key each example's time and noise.

  Returns:
    x_t [B, ...], times [B] and velocities [B, ...], float32.
  """
  time = rng_lib.per_example(lambda k: sample_time(k, shift), key, 'time', example)
  normal = lambda k: jax.random.normal(k, data.shape[1:])
  noise = rng_lib.per_example(normal, key, 'noise', example)
  return path(data, noise, time), time, target(data, noise)


def squared_error(prediction: Array, wanted: Array) -> Array:
  """Summed squared error, a float32 scalar; the count that divides it is `wanted.size`."""
  error = prediction.astype(jnp.float32) - wanted.astype(jnp.float32)
  return jnp.sum(jnp.square(error))


def _over(time: Array, data: Array) -> Array:
  return time.reshape(time.shape[0], *([1] * (data.ndim - 1))).astype(jnp.float32)
