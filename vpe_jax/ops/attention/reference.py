"""Dense attention over a Visibility: the definition that every other implementation must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vpe_jax.contracts import Array, Visibility, visible


def attention(
  q: Array, k: Array, v: Array, query: Visibility, key: Visibility, bias: Array | None = None
) -> tuple[Array, Array]:
  """Grouped-query attention; softmax in float32.

  Args:
    q: queries [B, L, N, H].
    k: keys [B, S, K, H]; query head n reads key/value head n // (N // K).
    v: values [B, S, K, H].
    query: visibility of the queries [B, L].
    key: visibility of the keys [B, S].
    bias: added to the logits, broadcastable to [B, N, L, S].

  Returns:
    The mixed values (attention output) [B, L, N, H] in the dtype of `q`, and the log-sum-exp
    [B, L, N] of the logits in float32. A query that sees no key gets zeros and -inf.
  """
  B, L, N, H = q.shape
  K, S = k.shape[2], k.shape[1]
  # The queries of a group fold into rows of one matrix per key/value head: plain batched matmuls,
  # which every backend runs several times faster than products with two free axes.
  folded = (q * H**-0.5).reshape(B, L, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
  keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  logits = jnp.einsum('BKLH,BKSH->BKLS', folded, keys, preferred_element_type=jnp.float32)
  logits = logits.reshape(B, K, N // K, L, S)
  if bias is not None:
    logits = logits + jnp.broadcast_to(bias, (B, N, L, S)).reshape(logits.shape)
  mask = visible(query, key)[:, None, None]
  # exp(-inf) is 0, so one mask does for logits and weights, forward and backward; the floor keeps
  # the difference defined for queries that see no key.
  logits = jnp.where(mask, logits, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
  top = jnp.maximum(top, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(logits - top)
  total = jnp.sum(weights, -1, keepdims=True)
  seen = total > 0
  safe = jnp.where(seen, total, 1.0)
  folded = weights.astype(v.dtype).reshape(B, K, -1, S)
  mixed = jnp.einsum('BKLS,BKSH->BKLH', folded, values, preferred_element_type=jnp.float32)
  mixed = (mixed.reshape(B, K, N // K, L, H) / safe).transpose(0, 3, 1, 2, 4)
  lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)[..., 0]
  mixed = mixed.reshape(B, L, N, H).astype(q.dtype)
  # The name that remat policies save (blockwise.SAVED).
  return checkpoint_name(mixed, 'attention'), lse.transpose(0, 3, 1, 2).reshape(B, L, N)
