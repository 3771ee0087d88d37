"""Attention by cuDNN on NVIDIA GPUs, where the mask is known to be causal or padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array, Visibility

WIDEST = 128  # head width


def refusal(q: Array, hint: str) -> str:
  """Why cuDNN can't attend with queries [B, L, N, H] under a mask hint; '' if it can."""
  if hint not in ('causal', 'padding'):
    return "needs a mask that is known to be causal or padding: name 'pallas_gpu'"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"computes in bfloat16 or float16, not {q.dtype}: name 'pallas_gpu'"
  if q.shape[-1] > WIDEST or q.shape[-1] % 8:
    return f"takes heads 8, 16, ... or {WIDEST} wide, not {q.shape[-1]}: name 'pallas_gpu'"
  return ''


def attention(q: Array, k: Array, v: Array, query: Visibility, key: Visibility, hint: str) -> Array:
  """Mixed values [B, L, N, H] as `reference.attention` returns them.

  Args:
    q: queries [B, L, N, H].
    k: keys [B, S, K, H].
    v: values [B, S, K, H].
    query: visibility of the queries [B, L].
    key: visibility of the keys [B, S]; with `padding`, the absent ones are stored last.
    hint: `causal` or `padding`, see `chooser.attention`.
  """
  if hint == 'causal':
    return _attend(q, k, v, None, is_causal=True)
  count = jnp.sum(key.until > 0, 1, dtype=jnp.int32)
  # A sequence without present keys attends to its first slot, as a softmax over no key is NaN; its
  # output is zeroed below.
  lengths = jnp.maximum(count, 1)
  mixed = _attend(q, k, v, lengths, is_causal=False)
  seen = (query.reach > query.since) & (count > 0)[:, None]
  return jnp.where(seen[:, :, None, None], mixed, 0.0)


def _cudnn_attention(q: Array, k: Array, v: Array, lengths: Array | None, is_causal: bool) -> Array:
  return jax.nn.dot_product_attention(
    q, k, v, key_value_seq_lengths=lengths, is_causal=is_causal, implementation='cudnn'
  )


_attend = jax.jit(_cudnn_attention, static_argnames='is_causal')
# The name by which ops/activity.py recognizes a call in a jaxpr.
CALL = _cudnn_attention.__name__
