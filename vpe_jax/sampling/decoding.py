"""Draws tokens from logits, one row at a time or a whole sequence with a cache on device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array
from vpe_jax.sampling.settings import TokenSampling

# (cache, tokens [B], index) -> (logits of the next token [B, V], cache with these tokens in it)
Step = Callable[[Any, Array, Array], tuple[Array, Any]]


def filter_logits(
  logits: Array,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
) -> Array:
  """Scales the logits and sets those that may not be drawn to -inf.

  The filters apply in this order, each to what the one before left; tokens that tie with the
  last one kept are kept too, and the most likely token always is.

  Args:
    logits: [..., V], any float dtype.
    temperature: divides the logits; 0 is greedy: only the (first) largest is left.
    top_k: keeps the k largest (0: all).
    top_p: keeps the smallest set of the largest whose probabilities reach it (1: all).
    min_p: keeps tokens of at least this share of the largest probability (0: all).

  Returns:
    float32 [..., V].

  Raises:
    UserError: a setting is out of range.
  """
  # The config knows what is out of range.
  TokenSampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  logits = logits.astype(jnp.float32)
  if temperature == 0:
    largest = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == largest, 0.0, -jnp.inf)
  logits = logits / temperature
  if 0 < top_k < logits.shape[-1]:
    kept = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < kept, -jnp.inf, logits)
  if top_p < 1:
    falling = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first token has nothing before it, so it's kept even where rounding makes that nonzero.
    inside = (before < top_p).at[..., 0].set(True)
    kept = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < kept, -jnp.inf, logits)
  if min_p > 0:
    kept = jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
    logits = jnp.where(logits < kept, -jnp.inf, logits)
  return logits


def sample_tokens(keys: Array, logits: Array, settings: TokenSampling) -> Array:
  """Draws one token a row: [B] int32.

  Args:
    keys: [B], one key a row, so that a row's draw doesn't depend on its neighbours.
    logits: [B, V].
    settings: static under jit.
  """
  allowed = filter_logits(
    logits, settings.temperature, settings.top_k, settings.top_p, settings.min_p
  )
  if settings.temperature == 0:
    return jnp.argmax(allowed, axis=-1).astype(jnp.int32)
  return jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32)


def log_likelihood(logits: Array, codes: Array) -> Array:
  """The mean log-probability of codes [B, L] in nats: float32 [B].

  That of the whole distribution at temperature 1, whatever filters they were drawn through.

  Args:
    logits: [B, L, V] that predict each code from those before it.
    codes: int32 in 0 .. V - 1.
  """
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
  return jnp.mean(picked - jax.nn.logsumexp(logits, axis=-1), axis=-1)


def decode(
  step: Step,
  cache: Any,
  first_logits: Array,
  length: int,
  keys: Array,
  settings: TokenSampling,
  offset: int = 0,
) -> tuple[Array, Any]:
  """Draws `length` codes one after the other, on device, with a cache.

  The draw at place i of row b uses `fold_in(keys[b], i)`. The last code is fed too, so that the
  returned cache holds the keys and values of all `length` codes: `step` is called `length` times.

  Args:
    step: takes the cache, the tokens just drawn as rows of the joint vocabulary [B]
      (code + `offset`), and their place 0 .. length - 1 (int32 scalar); returns the logits
      [B, V] of the next code and the new cache.
    cache: any pytree of arrays of fixed shape, with the prefix in it.
    first_logits: logits of the first code, [B, V]; entry v is code v.
    length: number of codes.
    keys: [B], one key a row.
    settings: static.
    offset: row of code 0 in the vocabulary that `step` embeds.

  Returns:
    Codes [B, length] int32 in 0 .. V - 1, and the cache.
  """

  def body(carry: tuple[Any, Array], index: Array) -> tuple[tuple[Any, Array], Array]:
    cache, logits = carry
    codes = sample_tokens(jax.vmap(jax.random.fold_in, (0, None))(keys, index), logits, settings)
    logits, cache = step(cache, codes + offset, index)
    return (cache, logits.astype(jnp.float32)), codes

  start = (cache, first_logits.astype(jnp.float32))
  (cache, _), codes = jax.lax.scan(body, start, jnp.arange(length, dtype=jnp.int32))
  return codes.T, cache
