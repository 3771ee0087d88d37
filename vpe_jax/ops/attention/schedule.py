"""Which pairs of query and key blocks contain a visible pair of tokens: decided at run time.

This one definition serves every blockwise implementation. A pair of blocks is skipped if minima and
maxima of the Visibility of its tokens show that no query sees a key. It needs no mask if they show
that every query sees every key. Absent tokens (a query with an empty interval, a key with `until`
0) are left out of the minima and maxima, so that padding and dropped conditions don't widen them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, Visibility

SKIP, PARTIAL, FULL = 0, 1, 2  # status of a pair of blocks
_SMALLEST, _LARGEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
_SHIFT = 2  # an entry of `visits` is (block << _SHIFT) | status


def padded(visibility: Visibility, length: int) -> Visibility:
  """The same tokens, followed by absent ones up to `length`: [B, L] -> [B, length]."""
  extra = length - visibility.order.shape[1]
  return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, extra))), visibility)


def block_status(query: Visibility, key: Visibility, rows: int, columns: int) -> Array:
  """SKIP, PARTIAL or FULL for each pair of blocks.

  Never SKIP where a query sees a key, and FULL only where all queries of the block see all its
  keys; PARTIAL where minima and maxima don't decide.

  Args:
    query: visibility of the queries [B, L].
    key: visibility of the keys [B, S].
    rows: queries per block; the last block may be shorter.
    columns: keys per block; the last block may be shorter.

  Returns:
    int32 [B, ceil(L / rows), ceil(S / columns)].
  """
  present, least, most = _bounds(query, rows, query.reach > query.since)
  stored, low, high = _bounds(key, columns, key.until > 0)
  # The query side varies along axis 1, the key side along axis 2.
  least, most = (jax.tree.map(lambda x: x[:, :, None], side) for side in (least, most))
  low, high = (jax.tree.map(lambda x: x[:, None, :], side) for side in (low, high))
  some = (
    jnp.any(present, -1)[:, :, None]
    & jnp.any(stored, -1)[:, None, :]
    & (least.since <= high.order)
    & (low.order < most.reach)
    & (least.order < high.until)
  )
  every = (
    jnp.all(present, -1)[:, :, None]
    & jnp.all(stored, -1)[:, None, :]
    & (most.since <= low.order)
    & (high.order < least.reach)
    & (most.order < low.until)
  )
  return some.astype(jnp.int32) + (some & every)


def visits(status: Array) -> Array:
  """Lists the key blocks to visit for each query block, by ascending index.

  Args:
    status: status of each pair of a query block and a key block [B, I, J].

  Returns:
    int32 [B, I, J]. An entry is `4 * block + status` (see `block_of`). Entries after the last visit
    have status SKIP and repeat the block of the last visit, so that a kernel fetches nothing new.
  """
  places = jnp.argsort(status == SKIP, axis=-1, stable=True)
  ranked = jnp.take_along_axis(status, places, -1)
  count = jnp.sum(status != SKIP, -1, keepdims=True)
  last = jnp.take_along_axis(places, jnp.maximum(count - 1, 0), -1)
  places = jnp.where(ranked == SKIP, last, places).astype(jnp.int32)
  return (places << _SHIFT) | ranked


def block_of(entry: Array) -> tuple[Array, Array]:
  """The block and the status of an entry of `visits`."""
  return entry >> _SHIFT, entry & ((1 << _SHIFT) - 1)


def _bounds(
  visibility: Visibility, block: int, present: Array
) -> tuple[Array, Visibility, Visibility]:
  """Presence of tokens [B, I, block]; minima and maxima [B, I] over the present ones of a block."""
  B, L = present.shape
  blocks = -(-L // block)
  cut = lambda x: x.reshape(B, blocks, block)
  mask = cut(jnp.pad(present, ((0, 0), (0, blocks * block - L))))
  tokens = jax.tree.map(cut, padded(visibility, blocks * block))
  least = jax.tree.map(lambda x: jnp.min(jnp.where(mask, x, _LARGEST), -1), tokens)
  most = jax.tree.map(lambda x: jnp.max(jnp.where(mask, x, _SMALLEST), -1), tokens)
  return mask, least, most
