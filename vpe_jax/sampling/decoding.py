"""Draws tokens from logits, one row at a time or a whole sequence with a cache on device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array
from vpe_jax.sampling.autoregressive import (  # noqa: F401
  filter_logits,
  log_likelihood,
  sample_tokens,
)

# (cache, tokens [B], index) -> (logits of the next token [B, V], cache with these tokens in it)
Step = Callable[[Any, Array, Array], tuple[Array, Any]]


def decode(
  step: Step,
  cache: Any,
  first_logits: Array,
  length: int,
  keys: Array,
  settings: SampleConfig,
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
