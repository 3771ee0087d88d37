"""Integrates the flow from noise (t = 1) to data (t = 0) with Euler steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array
from vpe_jax.sampling.flow import time_grid  # noqa: F401


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
