"""Samples tokens one after the other, on device, from a network that extends a cached prefix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array
from vpe_jax.sampling.guidance import Branch, Guidance, combine
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sampling.settings import TokenSampling

# (prefix of n stacked branches, tokens [n B, ...], index) -> the prefix with these tokens in it
Feed = Callable[[Prefix, Array, Array], Prefix]
# (keys [B], `state` of the prefix, index) -> tokens [B, ...]
Draw = Callable[[Array, Any, Array], Array]


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
    settings: `temperature`, `top_k`, `top_p` and `min_p` are read; static under jit.
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


def categorical(
  logits: Callable[[Any], Array],
  settings: TokenSampling,
  guidance: Guidance,
  branches: Sequence[Branch],
  steps: int = 1,
) -> Draw:
  """Draws codes or text from guided logits; see `sample_tokens`.

  Args:
    logits: from the prefix's state to the next token's logits [n B, V], of all branches.
    settings: static.
    guidance: of the logits.
    branches: the n branches that are stacked, see `guidance.stacked`.
    steps: tokens in all, for the schedule of guidance.
  """

  def draw(keys: Array, state: Any, index: Array) -> Array:
    guided = combine(guidance, logits(state), branches, index, steps)
    return sample_tokens(keys, guided, settings)

  return draw


@dataclasses.dataclass(frozen=True)
class Stop:
  """Where text ends before its largest length.

  Attributes:
    ends: tokens that end a sequence; the one that is drawn is part of it.
    pad: token of all places after that.
  """

  ends: tuple[int, ...]
  pad: int


def generate(
  feed: Feed,
  prefix: Prefix,
  length: int,
  keys: Array,
  draw: Draw,
  branches: int = 1,
  stop: Stop | None = None,
) -> tuple[Array, Prefix]:
  """Samples `length` tokens, each from the prefix that ends with the one before.

  The token at index i of batch element b is drawn with `fold_in(keys[b], i)`. Every token is fed,
  the last one too, so another run of tokens, of another vocabulary perhaps, can follow on the
  returned prefix: `feed` is called `length` times, or until all sequences have ended.

  A token is whatever `draw` returns: a code, the vector that an inner sampler makes of a hidden
  state, or a group of several.

  Args:
    feed: puts tokens into the prefix; its index counts from 0. Shapes and dtypes of the prefix
      stay the same.
    prefix: n stacked branches of B batch elements; all get the same tokens.
    length: number of tokens; with `stop` the largest number.
    keys: [B], one key a batch element, so that none depends on its neighbours.
    draw: draws the next tokens.
    branches: n.
    stop: ends sequences of single integer tokens early; None: never.

  Returns:
    Tokens [B, length, ...], and the prefix with all of them in it.
  """

  def drawn(prefix: Prefix, index: Array) -> Array:
    return draw(jax.vmap(jax.random.fold_in, (0, None))(keys, index), prefix.state, index)

  def fed(prefix: Prefix, tokens: Array, index: Array) -> Prefix:
    return feed(prefix, jnp.concatenate([tokens] * branches), index)

  if stop is not None:
    return _until(drawn, fed, prefix, length, keys.shape[0], stop)

  def body(prefix: Prefix, index: Array) -> tuple[Prefix, Array]:
    tokens = drawn(prefix, index)
    return fed(prefix, tokens, index), tokens

  prefix, tokens = jax.lax.scan(body, prefix, jnp.arange(length, dtype=jnp.int32))
  return jnp.moveaxis(tokens, 0, 1), prefix


def _until(
  drawn: Callable[[Prefix, Array], Array],
  fed: Callable[[Prefix, Array, Array], Prefix],
  prefix: Prefix,
  length: int,
  count: int,
  stop: Stop,
) -> tuple[Array, Prefix]:
  """`generate` for `count` sequences, until all of them have ended."""
  Carry = tuple[Prefix, Array, Array, Array]

  def running(carry: Carry) -> Array:
    _, _, ended, index = carry
    return (index < length) & ~jnp.all(ended)

  def body(carry: Carry) -> Carry:
    prefix, tokens, ended, index = carry
    token = jnp.where(ended, stop.pad, drawn(prefix, index))
    ended |= jnp.isin(token, jnp.asarray(stop.ends, token.dtype))
    return fed(prefix, token, index), tokens.at[:, index].set(token), ended, index + 1

  tokens = jnp.full((count, length), stop.pad, jnp.int32)
  start = prefix, tokens, jnp.zeros((count,), bool), jnp.int32(0)
  prefix, tokens, _, _ = jax.lax.while_loop(running, body, start)
  return tokens, prefix
