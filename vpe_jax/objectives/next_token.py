"""Next-token cross-entropy over a tied vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax import sharding
from vpe_jax.contracts import Array


def cross_entropy(
  hidden: Array, table: Array, targets: Array, weights: Array, chunk: int = 0
) -> tuple[Array, Array]:
  """Summed cross-entropy of the logits `hidden @ table.T`, and of its argmax being right.

  Args:
    hidden: outputs [B, L, D] of the positions that predict.
    table: vocabulary rows [V, D].
    targets: ids to predict [B, L].
    weights: float32 [B, L]; 0 where nothing is predicted.
    chunk: tokens of a row whose logits exist at a time (0: all); each chunk's logits are computed
      again in the backward pass, so that [B, L, V] never exists. Where it doesn't divide L, the
      last chunk is filled up with rows of weight 0.

  Returns:
    Weighted sums over the batch, float32 scalars: of the cross-entropy in nats, and of hits.
  """

  count = table.shape[0]

  def one(args: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    rows, wanted, weight = args
    logits = jnp.einsum('BLD,VD->BLV', rows, table)
    logits = logits.astype(jnp.float32)
    if table.shape[0] > count:
      logits = jnp.where(jnp.arange(table.shape[0]) < count, logits, -jnp.inf)
    picked = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    hit = (jnp.argmax(logits, -1) == wanted).astype(jnp.float32)
    return jnp.sum(loss * weight), jnp.sum(hit * weight)

  # Filled up with rows that are never right, so that each device of a layer computes its share.
  table = jnp.pad(table.astype(hidden.dtype), ((0, -count % sharding.num_shards('vocab')), (0, 0)))
  # Whole before the loop: inside, each chunk would gather the vocabulary from all devices again.
  table = sharding.constrain(table, ('vocab', None))
  if not chunk or chunk >= hidden.shape[1]:
    return one((hidden, targets, weights))

  def cut(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *([(0, 0)] * (x.ndim - 2))))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  pieces = tuple(cut(x) for x in (hidden, targets, weights))
  losses, hits = jax.lax.map(jax.checkpoint(one), pieces)
  return jnp.sum(losses), jnp.sum(hits)
