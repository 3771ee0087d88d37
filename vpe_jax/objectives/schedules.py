"""Step-dependent weights: the progressive schedule of VPE (arXiv 2606.04457, Eq. 2 and 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array


def sigmoid_schedule(
  step: Array | int, total: int, start: float, end: float, steepness: float = 10.0
) -> Array:
  """start (1 - s) + end s with s = sigmoid(steepness (step / total - 1/2)); float32.

  Beyond `total` the value at `total` holds.
  """
  progress = jnp.minimum(jnp.asarray(step, jnp.float32) / total, 1.0)
  share = jax.nn.sigmoid(steepness * (progress - 0.5))
  return start * (1.0 - share) + end * share
