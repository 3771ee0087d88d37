"""Classifier-free guidance, with all branches in one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def branches(scale: float) -> dict[str, float]:
  """Branch -> its weight in `classifier_free`, without those that weigh nothing."""
  return _needed({'conditional': scale, 'null': 1.0 - scale})


def edit_branches(text: float, image: float) -> dict[str, float]:
  """Branch -> its weight in the guidance of edits, without those that weigh nothing.

  null + image (reference - null) + text (conditional - reference), where `conditional` has all
  conditions, `reference` the picture before alone, and `null` none (InstructPix2Pix, arXiv
  2211.09800). As a weighted sum it needs no null branch where `image` is 1, no reference branch
  where both scales are equal, and one branch alone where both are 1.
  """
  return _needed({'conditional': text, 'reference': image - text, 'null': 1.0 - image})


def _needed(weights: Mapping[str, float]) -> dict[str, float]:
  return {name: weight for name, weight in weights.items() if weight}


def weighted(stacked: Array, weights: Sequence[float]) -> Array:
  """The weighted sum of branches [n B, ...] that lie one behind the other: [B, ...] float32."""
  parts = jnp.split(stacked.astype(jnp.float32), len(weights))
  return sum(weight * part for weight, part in zip(weights, parts, strict=True))


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
