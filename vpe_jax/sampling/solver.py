"""Integrates the flow from noise (t = 1) to data (t = 0) with Euler steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, UserError


def time_grid(steps: int, shift: float = 1.0) -> Array:
  """Times from 1 (noise) to 0 (data) for `steps` calls of the network.

  A uniform grid t is moved towards noise by t' = s t / (1 + (s - 1) t). Show-o2
  (transport/integrators.py) spaces K points u in its own clock u = 1 - t as u / (u + s - s u),
  s = 3, which is the same grid; its K points make K - 1 calls: `time_grid(K - 1, 3.0)`.

  Args:
    steps: number of Euler steps, which is the number of network calls.
    shift: s, above 0; 1 leaves the grid uniform and larger values spend more steps near noise.

  Returns:
    float32 [steps + 1], strictly falling, with exact ends 1 and 0.

  Raises:
    UserError: no step at all, or a shift that isn't positive.
  """
  if steps < 1:
    raise UserError(f'steps is {steps}: a sampler needs at least 1 step')
  if not 0 < shift < float('inf'):
    raise UserError(f'shift is {shift}: it must be a positive number (1 is a uniform grid)')
  uniform = np.linspace(1.0, 0.0, steps + 1)
  return jnp.asarray(shift * uniform / (1 + (shift - 1) * uniform), jnp.float32)


def euler(velocity: Callable[[Array, Array], Array], noise: Array, times: Array) -> Array:
  """Follows v = eps - x from noise to data: x at t - dt is x - dt v(x, t).

  Args:
    velocity: takes the state (float32, the shape of `noise`) and a float32 scalar time, and
      returns the velocity in the same shape (any float dtype).
    noise: the state at `times[0]`.
    times: falling times [S + 1]; the network is called at all but the last.

  Returns:
    The state at `times[-1]`, float32 whatever the network computes in.
  """

  def step(state: Array, span: tuple[Array, Array]) -> tuple[Array, None]:
    start, end = span
    return state - (start - end) * velocity(state, start).astype(jnp.float32), None

  data, _ = jax.lax.scan(step, noise.astype(jnp.float32), (times[:-1], times[1:]))
  return data
