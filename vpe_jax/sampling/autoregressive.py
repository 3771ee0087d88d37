"""Autoregressive sampling, on device, from a network that extends a cached prefix."""

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

# (prefix of n stacked branches, tokens [n B, ...], index) -> the prefix extended by the tokens
Extend = Callable[[Prefix, Array, Array], Prefix]
# (keys [B], `state` of the prefix, index) -> tokens [B, ...]
Sample = Callable[[Array, Any, Array], Array]


def filter_logits(
  logits: Array,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
) -> Array:
  """Divides logits by the temperature and sets those of excluded tokens to -inf.

  The filters apply in the order of the arguments, each to the tokens that remain. Tokens that tie
  with the last remaining one remain, too, and the most likely token always remains.

  Args:
    logits: [..., V], any float dtype.
    temperature: divides the logits; 0 is greedy: only the (first) largest remains.
    top_k: keep the k most likely tokens (0: all).
    top_p: keep the smallest set of most likely tokens that has this total probability (1: all).
    min_p: keep tokens with at least this fraction of the largest probability (0: all).

  Returns:
    float32 [..., V].

  Raises:
    UserError: a setting is out of range.
  """
  # The constructor checks the ranges.
  TokenSampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  logits = logits.astype(jnp.float32)
  if temperature == 0:
    largest = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == largest, 0.0, -jnp.inf)
  logits = logits / temperature
  if 0 < top_k < logits.shape[-1]:
    threshold = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if top_p < 1:
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    preceding = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first token remains even if rounding makes the sum before it nonzero.
    inside = (preceding < top_p).at[..., 0].set(True)
    threshold = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if min_p > 0:
    threshold = jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  return logits


def sample_tokens(keys: Array, logits: Array, settings: TokenSampling) -> Array:
  """Samples one token per batch element: [B] int32.

  Args:
    keys: [B], one key per batch element, so that elements don't depend on each other.
    logits: [B, V].
    settings: `temperature`, `top_k`, `top_p` and `min_p` are used; static under jit.
  """
  filtered = filter_logits(
    logits, settings.temperature, settings.top_k, settings.top_p, settings.min_p
  )
  if settings.temperature == 0:
    return jnp.argmax(filtered, axis=-1).astype(jnp.int32)
  return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)


def log_likelihood(logits: Array, codes: Array) -> Array:
  """The mean log-probability of codes [B, L] in nats: float32 [B].

  It uses the unfiltered distribution at temperature 1, however the codes were sampled.

  Args:
    logits: [B, L, V]; each position predicts its code from the previous ones.
    codes: int32 in 0 .. V - 1.
  """
  logits = logits.astype(jnp.float32)
  code_logits = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
  return jnp.mean(code_logits - jax.nn.logsumexp(logits, axis=-1), axis=-1)


def categorical(
  logits: Callable[[Any], Array],
  settings: TokenSampling,
  guidance: Guidance,
  branches: Sequence[Branch],
  steps: int = 1,
) -> Sample:
  """Makes a function that samples codes or text from guided logits; see `sample_tokens`.

  Args:
    logits: maps the state of the prefix to the next token's logits [n B, V] of all branches.
    settings: static under jit.
    guidance: guidance of the logits.
    branches: the n stacked branches, see `guidance.stacked`.
    steps: total number of tokens, for the schedule of guidance.
  """

  def sample(keys: Array, state: Any, index: Array) -> Array:
    guided = combine(guidance, logits(state), branches, index, steps)
    return sample_tokens(keys, guided, settings)

  return sample


@dataclasses.dataclass(frozen=True)
class Stop:
  """Tokens that end sequences before their maximum length.

  Attributes:
    ends: tokens that end a sequence; they are part of it.
    pad: token of all positions after the end.
  """

  ends: tuple[int, ...]
  pad: int


def generate(
  extend: Extend,
  prefix: Prefix,
  length: int,
  keys: Array,
  sample: Sample,
  branches: int = 1,
  stop: Stop | None = None,
) -> tuple[Array, Prefix]:
  """Samples `length` tokens, each from the prefix extended by the previous ones.

  The token at index i of batch element b is sampled with `fold_in(keys[b], i)`. The prefix is
  extended by every token, including the last one, so sampling can continue from the returned
  prefix, possibly with another vocabulary. `extend` is called `length` times, or until all
  sequences have ended.

  A token is the result of `sample`: a code, a vector that an inner sampler computes from a hidden
  state, or a group of them.

  Args:
    extend: extends the prefix by tokens, whose index counts from 0. It preserves shapes and dtypes
      of the prefix.
    prefix: n stacked branches of B batch elements; all branches get the same tokens.
    length: number of tokens; with `stop`, the maximum.
    keys: [B], one key per batch element, so that elements don't depend on each other.
    sample: samples the next tokens.
    branches: number n of stacked branches.
    stop: ends sequences of single integer tokens early; None: never.

  Returns:
    Tokens [B, length, ...], and the prefix extended by all of them.
  """

  def next_token(prefix: Prefix, index: Array) -> Array:
    return sample(jax.vmap(jax.random.fold_in, (0, None))(keys, index), prefix.state, index)

  def extend_all(prefix: Prefix, tokens: Array, index: Array) -> Prefix:
    return extend(prefix, jnp.concatenate([tokens] * branches), index)

  if stop is not None:
    return _generate_until(next_token, extend_all, prefix, length, keys.shape[0], stop)

  def body(prefix: Prefix, index: Array) -> tuple[Prefix, Array]:
    tokens = next_token(prefix, index)
    return extend_all(prefix, tokens, index), tokens

  prefix, tokens = jax.lax.scan(body, prefix, jnp.arange(length, dtype=jnp.int32))
  return jnp.moveaxis(tokens, 0, 1), prefix


def _generate_until(
  next_token: Callable[[Prefix, Array], Array],
  extend_all: Callable[[Prefix, Array, Array], Prefix],
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
    token = jnp.where(ended, stop.pad, next_token(prefix, index))
    ended |= jnp.isin(token, jnp.asarray(stop.ends, token.dtype))
    return extend_all(prefix, token, index), tokens.at[:, index].set(token), ended, index + 1

  tokens = jnp.full((count, length), stop.pad, jnp.int32)
  start = prefix, tokens, jnp.zeros((count,), bool), jnp.int32(0)
  prefix, tokens, _, _ = jax.lax.while_loop(running, body, start)
  return tokens, prefix
