"""Next-token cross-entropy over a tied vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax import sharding
from vpe_jax.contracts import Array


def cross_entropy(
  hidden: Array, table: Array, targets: Array, weights: Array, chunk: int = 0
) -> tuple[Array, Array]:
  """Summed cross-entropy and accuracy of the logits `hidden @ table.T`.

  Args:
    hidden: outputs [B, L, D] of the predicting positions.
    table: vocabulary embeddings [V, D].
    targets: ids to predict [B, L].
    weights: float32 [B, L]; 0 where nothing is predicted.
    chunk: tokens of a sequence whose logits exist at a time (0: all). The logits of each chunk are
      recomputed in the backward pass, so that [B, L, V] never exists. If it doesn't divide L, the
      last chunk is padded with tokens of weight 0.

  Returns:
    Weighted sums over the batch, float32 scalars: of the cross-entropy in nats, and of correct
    predictions.
  """
  count = table.shape[0]
  # Padded so that it divides over the devices of the axis `tensor`; padding has logits of -inf.
  padding = -count % sharding.num_shards('vocab')
  padded = jnp.pad(table.astype(hidden.dtype), ((0, padding), (0, 0)))
  # Gathered before the loop: inside it, every chunk would gather the table again.
  padded = sharding.constrain(padded, ('vocab', None))

  def chunk_sums(args: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    hidden, targets, weights = args
    logits = jnp.einsum('BLD,VD->BLV', hidden, padded)
    logits = logits.astype(jnp.float32)
    if padding:
      logits = jnp.where(jnp.arange(count + padding) < count, logits, -jnp.inf)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - target_logits
    hit = (jnp.argmax(logits, -1) == targets).astype(jnp.float32)
    return jnp.sum(loss * weights), jnp.sum(hit * weights)

  if not chunk or chunk >= hidden.shape[1]:
    return chunk_sums((hidden, targets, weights))

  def split(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *([(0, 0)] * (x.ndim - 2))))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  chunks = tuple(split(x) for x in (hidden, targets, weights))
  losses, hits = jax.lax.map(jax.checkpoint(chunk_sums), chunks)
  return jnp.sum(losses), jnp.sum(hits)
