"""Dense attention over a Visibility: the definition that every other implementation meets."""

from __future__ import annotations

import math

import jax.numpy as jnp

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
    The mixed values [B, L, N, H] in the dtype of `q`, and the log-sum-exp [B, L, N] in float32.
    A query that sees no key gets zeros and -inf.
  """
  B, L, N, H = q.shape
  K = k.shape[2]
  grouped = q.reshape(B, L, K, N // K, H)
  logits = jnp.einsum('BLKGH,BSKH->BKGLS', grouped, k, preferred_element_type=jnp.float32)
  logits = logits / math.sqrt(H)
  if bias is not None:
    logits = logits + bias.reshape(bias.shape[0], K, N // K, *bias.shape[2:])
  mask = visible(query, key)[:, None, None]
  # The floor keeps exp() finite in rows that see nothing; the mask is applied to the weights too,
  # as exp(floor - floor) is 1.
  floor = jnp.finfo(jnp.float32).min
  logits = jnp.where(mask, logits, floor)
  top = jnp.max(logits, -1, keepdims=True)
  weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
  total = jnp.sum(weights, -1, keepdims=True)
  seen = total > 0
  weights = weights / jnp.where(seen, total, 1.0)
  mixed = jnp.einsum('BKGLS,BSKH->BLKGH', weights.astype(v.dtype), v)
  lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)[..., 0]
  return mixed.reshape(B, L, N, H), jnp.moveaxis(lse, -1, 1).reshape(B, L, N)
