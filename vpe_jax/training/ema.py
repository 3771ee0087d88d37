"""The exponential moving average (EMA) of trainable parameters."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from vpe_jax.contracts import Array, Params


def decay_at(updates: Array, decay: float) -> Array:
  """The decay after n = `updates` updates: `decay`, but at most (1 + n) / (10 + n).

  A constant decay of 0.9995 would still hold half of the initial parameters after 1,400 steps;
  the bound lets short runs average over about the last tenth of their steps.
  """
  n = jnp.asarray(updates, jnp.float32)
  return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def update(average: Params, trainable: Params, updates: Array, decay: float) -> Params:
  """average * decay + trainable * (1 - decay), leaf by leaf in float32."""
  return optax.incremental_update(trainable, average, 1.0 - decay_at(updates, decay))
