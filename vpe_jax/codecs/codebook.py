"""The choice of the nearest row of a codebook, as published tokenizers make it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array
from vpe_jax.models.siglip import unit

CHUNK = 16_384  # rows that are compared at once


def nearest(features: Array, codebook: Array, normed: bool, chunk: int = CHUNK) -> Array:
  """Index of the row with the largest dot product, the first of several.

  Large codebooks are compared part by part, so that no array holds all scores of a picture. The
  products are exact float32: rounded ones choose other rows.

  Args:
    features: [..., D].
    codebook: [V, D].
    normed: whether both are brought to length 1 first, which makes this the nearest row.
    chunk: rows compared at once; all of them where it doesn't divide V.

  Returns:
    [...] int32.
  """
  features, codebook = features.astype(jnp.float32), codebook.astype(jnp.float32)
  if normed:
    features, codebook = unit(features), unit(codebook)
  highest = jax.lax.Precision.HIGHEST

  def best(rows: Array) -> tuple[Array, Array]:
    scores = jnp.einsum('...D,VD->...V', features, rows, precision=highest)
    return jnp.max(scores, -1), jnp.argmax(scores, -1).astype(jnp.int32)

  count = codebook.shape[0]
  if count <= chunk or count % chunk:
    return best(codebook)[1]

  def better(found: tuple[Array, Array], part: tuple[Array, Array]):
    rows, first = part
    score, index = best(rows)
    ahead = score > found[0]
    return (jnp.where(ahead, score, found[0]), jnp.where(ahead, first + index, found[1])), None

  parts = codebook.reshape(-1, chunk, codebook.shape[1])
  firsts = jnp.arange(0, count, chunk, dtype=jnp.int32)
  start = best(parts[0])
  (_, index), _ = jax.lax.scan(better, start, (parts[1:], firsts[1:]))
  return index


def closest(features: Array, codebook: Array, chunk: int = CHUNK) -> Array:
  """Index of the row at the least distance, the first of several.

  Of x and e the distance is |x|^2 - 2 (x e - |e|^2 / 2), so one more column makes it the largest
  dot product. Arguments and result as `nearest`.
  """
  rows = codebook.astype(jnp.float32)
  offset = -0.5 * jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
  one = jnp.ones((*features.shape[:-1], 1), jnp.float32)
  wide = jnp.concatenate([features.astype(jnp.float32), one], axis=-1)
  return nearest(wide, jnp.concatenate([rows, offset], axis=-1), normed=False, chunk=chunk)
