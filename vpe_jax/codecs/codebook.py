"""Search for the best codebook entry of a feature: by dot product, cosine or distance."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array
from vpe_jax.models.siglip import unit

CHUNK = 16_384  # codebook entries compared at once


def largest_product(features: Array, codebook: Array, normed: bool, chunk: int = CHUNK) -> Array:
  """Index of the codebook entry with the largest dot product; the first one on a tie.

  Large codebooks are searched chunk by chunk, so that the scores of all entries never exist at
  once. Products have full float32 precision: with less, other entries may win.

  Args:
    features: [..., D].
    codebook: [V, D].
    normed: whether to normalize features and entries to length 1 first; the result is then also the
      nearest entry on the unit sphere.
    chunk: entries compared at once; if it doesn't divide V, all entries are compared at once.

  Returns:
    [...] int32.
  """
  features, codebook = features.astype(jnp.float32), codebook.astype(jnp.float32)
  if normed:
    features, codebook = unit(features), unit(codebook)
  highest = jax.lax.Precision.HIGHEST

  def search(entries: Array) -> tuple[Array, Array]:
    scores = jnp.einsum('...D,VD->...V', features, entries, precision=highest)
    return jnp.max(scores, -1), jnp.argmax(scores, -1).astype(jnp.int32)

  count = codebook.shape[0]
  if count <= chunk or count % chunk:
    return search(codebook)[1]

  def update(best: tuple[Array, Array], entries_and_offset: tuple[Array, Array]):
    entries, offset = entries_and_offset
    score, index = search(entries)
    better = score > best[0]
    return (jnp.where(better, score, best[0]), jnp.where(better, offset + index, best[1])), None

  chunks = codebook.reshape(-1, chunk, codebook.shape[1])
  offsets = jnp.arange(0, count, chunk, dtype=jnp.int32)
  (_, index), _ = jax.lax.scan(update, search(chunks[0]), (chunks[1:], offsets[1:]))
  return index


def nearest(features: Array, codebook: Array, chunk: int = CHUNK) -> Array:
  """Index of the codebook entry at the smallest distance; the first one on a tie.

  The squared distance of x and e is |x|^2 - 2 (x e - |e|^2 / 2). With 1 appended to x and
  -|e|^2 / 2 to e, the entry with the largest dot product is therefore at the smallest distance.
  Arguments and result are those of `largest_product`.
  """
  entries = codebook.astype(jnp.float32)
  offset = -0.5 * jnp.sum(jnp.square(entries), axis=-1, keepdims=True)
  one = jnp.ones((*features.shape[:-1], 1), jnp.float32)
  extended = jnp.concatenate([features.astype(jnp.float32), one], axis=-1)
  entries = jnp.concatenate([entries, offset], axis=-1)
  return largest_product(extended, entries, normed=False, chunk=chunk)
