"""AdamW with global-norm clipping and linear warm-up to a constant rate.

The optimizer's state is a plain dict {count, mu, nu}: checkpoints store it by path, and clipping,
weight decay and the learning rate need no memory (the rate follows the stage's step).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vpe_jax.config import OptimConfig
from vpe_jax.contracts import Array, Params

UNDECAYED = ('bias', 'scale')  # last names of leaves that weight decay leaves alone


def init(trainable: Params) -> dict[str, Any]:
  """Zero moments for the trainable leaves only."""
  return {
    'count': jnp.zeros((), jnp.int32),
    'mu': jax.tree.map(jnp.zeros_like, trainable),
    'nu': jax.tree.map(jnp.zeros_like, trainable),
  }


def learning_rate(stage_step: Array | int, config: OptimConfig) -> Array:
  """The rate at a step of the stage (from 0): warm-up reaches `lr` at step `warmup - 1`."""
  ramp = (jnp.asarray(stage_step, jnp.float32) + 1.0) / max(config.warmup, 1)
  return config.lr * jnp.minimum(ramp, 1.0)


def clip(gradient: Params, norm: Array, limit: float) -> Params:
  """Scales the gradient so that its global norm is at most `limit` (0: as it is)."""
  if not limit:
    return gradient
  scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
  return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradient)


def update(
  gradient: Params,
  opt_state: dict[str, Any],
  trainable: Params,
  stage_step: Array,
  config: OptimConfig,
) -> tuple[Params, dict[str, Any]]:
  """One AdamW step on a clipped gradient: the new trainable leaves and optimizer state."""
  moments = optax.ScaleByAdamState(**opt_state)
  adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
  direction, moments = adam.update(gradient, moments)
  if config.weight_decay:
    decay = optax.add_decayed_weights(config.weight_decay, mask=_decayed)
    direction, _ = decay.update(direction, decay.init(trainable), trainable)
  rate = learning_rate(stage_step, config)
  direction = jax.tree.map(lambda leaf: -rate * leaf, direction)
  return optax.apply_updates(trainable, direction), moments._asdict()


def _decayed(params: Params) -> Params:
  def is_decayed(path: tuple[Any, ...], _: Array) -> bool:
    return path[-1].key not in UNDECAYED

  return jax.tree_util.tree_map_with_path(is_decayed, params)
