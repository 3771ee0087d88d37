"""Classifier-free guidance, with both branches in one batch of twice the rows."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array, UserError


def classifier_free(conditional: Array, null: Array, scale: Array | float) -> Array:
  """null + scale (conditional - null), in float32.

  It is computed as a weighted sum, which makes scale 1 return exactly `conditional` and scale 0
  exactly `null` (Ho and Salimans 2022, in the convention of Show-o2 and BAGEL).

  Args:
    conditional: what the network says with its conditions, any shape.
    null: what it says without them, the same shape.
    scale: guidance scale, a number or an array that broadcasts.

  Raises:
    UserError: the scale is a number, and infinite or NaN.
  """
  if isinstance(scale, float) and not math.isfinite(scale):
    raise UserError(f'guidance is {scale}: it must be a finite number (1 is off)')
  scale = jnp.asarray(scale, jnp.float32)
  return scale * conditional.astype(jnp.float32) + (1 - scale) * null.astype(jnp.float32)


def stack(conditional: Any, null: Any) -> Any:
  """Joins the two branches along the rows: leaves [B, ...] and [B, ...] to [2B, ...].

  The conditional rows come first.
  """
  return jax.tree.map(lambda c, n: jnp.concatenate([c, n], axis=0), conditional, null)


def both(tree: Any) -> Any:
  """What the two branches share (the noisy state, say), once for each: [B, ...] to [2B, ...]."""
  return stack(tree, tree)


def split(stacked: Any) -> tuple[Any, Any]:
  """Undoes `stack`: leaves [2B, ...] to (conditional, null), each [B, ...]."""
  conditional = jax.tree.map(lambda leaf: leaf[: leaf.shape[0] // 2], stacked)
  null = jax.tree.map(lambda leaf: leaf[leaf.shape[0] // 2 :], stacked)
  return conditional, null
