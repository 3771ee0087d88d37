"""Attention block by block in plain XLA: O(L) memory on any backend.

The softmax runs online over blocks of keys, and the backward pass recomputes each block's weights
(FlashAttention-2, arXiv 2307.08691). The inner loops run only over the block pairs that the
schedule lists: first those that need no mask, then the others. The sequences of a batch are
processed one after another, each with its own schedule: a dropped condition costs nothing, and the
loops' operands stay in a CPU's cache at any batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array, Visibility, visible
from vpe_jax.ops.attention import schedule
from vpe_jax.ops.attention.blockwise import Gradients, Operands, attend

# ROWS: rows of a block of queries, one for each query and head of a group. COLUMNS: keys of a
# block. These sizes are the fastest on CPU, where a block of logits (1 MB) stays in the cache.
# Longer blocks of keys gain nothing with causal masks: fewer of them can be skipped.
ROWS, COLUMNS = 1024, 256
_MIN_QUERIES = 64  # lower limit of the queries per block, before `even` shortens it


def attention(
  q: Array, k: Array, v: Array, query: Visibility, key: Visibility, bias: Array | None = None
) -> tuple[Array, Array]:
  """Equals `reference.attention` within rounding, gradients included."""
  if bias is not None:
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
  group = q.shape[2] // k.shape[2]
  # Blocks are only as long as their number requires, which keeps padding short.
  rows = even(q.shape[1], max(_MIN_QUERIES, ROWS // group))
  kernel = Chunked(rows, even(k.shape[1], COLUMNS))
  return attend(kernel, Operands(q, k, v, query, key, bias))


def even(length: int, block: int, multiple: int = 8) -> int:
  """The smallest multiple of `multiple` that cuts `length` into as few blocks as `block` does."""
  count = -(-length // block)
  return -(-length // (count * multiple)) * multiple


@dataclasses.dataclass(frozen=True)
class Chunked:
  """The kernel at one size of blocks: `rows` queries by `columns` keys."""

  rows: int
  columns: int

  def forward(self, operands: Operands) -> tuple[Array, Array]:
    """See blockwise.Kernel."""
    mixed, lse = jax.lax.map(
      lambda b: self._forward(_sequence(operands, b)), jnp.arange(operands.q.shape[0])
    )
    return mixed[:, 0], lse[:, 0]

  def backward(self, operands: Operands, d_mixed: Array, lse: Array, delta: Array) -> Gradients:
    """See blockwise.Kernel."""
    bias = operands.bias

    def sequence(d_bias: Array | None, b: Array) -> tuple[Array | None, tuple[Array, ...]]:
      saved = (_at(x, b) for x in (d_mixed, lse, delta))
      *d_qkv, more = self._backward(_sequence(operands, b), *saved)
      if d_bias is None:
        return None, tuple(d_qkv)
      start = (b if bias.shape[0] > 1 else 0, 0, 0, 0)
      more += jax.lax.dynamic_slice(d_bias, start, more.shape)
      return jax.lax.dynamic_update_slice(d_bias, more, start), tuple(d_qkv)

    start = None if bias is None else jnp.zeros(bias.shape)
    d_bias, d_qkv = jax.lax.scan(sequence, start, jnp.arange(operands.q.shape[0]))
    d_q, d_k, d_v = (x[:, 0] for x in d_qkv)
    return d_q, d_k, d_v, None if bias is None else d_bias.astype(bias.dtype)

  def _forward(self, operands: Operands) -> tuple[Array, Array]:
    """`forward` of one sequence: B is 1."""
    blocks = _Blocks(self, operands)
    B, K, R, H = blocks.q.shape[1:]
    empty = (
      jnp.full((B, K, R), -jnp.inf),
      jnp.zeros((B, K, R)),
      jnp.zeros((B, K, R, H)),
    )

    def block(i: Array) -> tuple[Array, Array]:
      q = blocks.q[i]

      def step(j: Array, masked: bool, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, mixed = carry
        logits = blocks.logits(i, j, q, masked)
        new = jnp.maximum(top, jnp.max(logits, -1))
        # A query that has seen nothing yet stays at -inf; 0 in its place keeps exp() free of NaN.
        safe = jnp.where(new > -jnp.inf, new, 0.0)
        weights = jnp.exp(logits - safe[..., None])
        decay = jnp.exp(top - safe)
        total = total * decay + jnp.sum(weights, -1)
        v = blocks.v[j]
        more = _dot('BKLS,BKSH->BKLH', weights.astype(v.dtype), v)
        return new, total, mixed * decay[..., None] + more

      top, total, mixed = blocks.visit(i, step, empty)
      safe = jnp.where(total > 0, total, 1.0)
      # total is 0 where top is -inf.
      return (mixed / safe[..., None]).astype(q.dtype), top + jnp.log(safe)

    mixed, lse = jax.lax.map(block, jnp.arange(blocks.q.shape[0]))
    return blocks.unfold(mixed, operands.q.shape), blocks.unfold_row(lse, operands.q.shape)

  def _backward(self, operands: Operands, d_mixed: Array, lse: Array, delta: Array) -> Gradients:
    """`backward` of one sequence, with the bias's gradient in float32."""
    blocks = _Blocks(self, operands, by_keys=True)
    d_mixed = _fold(d_mixed, operands.k.shape[2], self.rows)
    lse, delta = (_fold_row(x, operands.k.shape[2], self.rows) for x in (lse, delta))
    zeros = jnp.zeros(blocks.k.shape[1:])

    def column(carry: tuple[Array, Array | None], j: Array) -> tuple[Any, tuple[Array, Array]]:
      k, v = blocks.k[j], blocks.v[j]

      def step(i: Array, masked: bool, carry: Any) -> Any:
        d_q, d_bias, d_k, d_v = carry
        q, gradient = blocks.q[i], d_mixed[i]
        weights = jnp.exp(blocks.logits(i, j, q, masked) - lse[i][..., None])
        d_v += _dot('BKLS,BKLH->BKSH', weights.astype(v.dtype), gradient)
        d_weights = _dot('BKLH,BKSH->BKLS', gradient, v)
        exact = weights * (d_weights - delta[i][..., None])
        d_logits = exact.astype(q.dtype)
        d_k += _dot('BKLS,BKLH->BKSH', d_logits, q)
        d_q = d_q.at[i].add(_dot('BKLS,BKSH->BKLH', d_logits, k))
        return d_q, blocks.add_to_bias(d_bias, i, j, exact), d_k, d_v

      *carry, d_k, d_v = blocks.visit(j, step, (*carry, zeros, zeros))
      return tuple(carry), (d_k, d_v)

    d_bias = None if blocks.bias is None else jnp.zeros(blocks.bias.shape)
    start = (jnp.zeros(blocks.q.shape), d_bias)
    (d_q, d_bias), d_kv = jax.lax.scan(column, start, jnp.arange(blocks.k.shape[0]))
    d_q = blocks.unfold(d_q, operands.q.shape).astype(operands.q.dtype)
    d_k, d_v = (blocks.unfold(x, operands.k.shape).astype(operands.k.dtype) for x in d_kv)
    if d_bias is not None:
      shape = operands.bias.shape
      d_bias = d_bias[:, :, : shape[2], : shape[3]]
    return d_q, d_k, d_v, d_bias


class _Blocks:
  """Operands of one sequence (B is 1), cut into blocks along a new first axis, and the schedule.

  I blocks of queries, `q` [I, B, K, G * rows, H]: the queries of all G heads of a group are rows of
  one matrix, see `reference`. J blocks of keys, `k` and `v` [J, B, K, columns, H]. `visit` runs
  over the blocks of keys that a block of queries needs or, if `by_keys`, over the blocks of queries
  that need a block of keys.
  """

  def __init__(self, kernel: Chunked, operands: Operands, by_keys: bool = False) -> None:
    o, K = operands, operands.k.shape[2]
    self.rows, self.columns = kernel.rows, kernel.columns
    self.q = _fold(o.q, K, self.rows)
    self.k, self.v = (_fold(x, K, self.columns) for x in (o.k, o.v))
    status = schedule.block_status(o.query, o.key, self.rows, self.columns)
    status = status.transpose(0, 2, 1) if by_keys else status
    self._visits = {}
    for kind in (schedule.FULL, schedule.PARTIAL):
      of_kind = jnp.where(status == kind, kind, schedule.SKIP)
      self._visits[kind] = schedule.visits(of_kind)[0], jnp.sum(status[0] == kind, -1)
    I, J = self.q.shape[0], self.k.shape[0]
    self._query = schedule.padded(o.query, I * self.rows)
    self._key = schedule.padded(o.key, J * self.columns)
    self.bias = o.bias
    if o.bias is not None:
      length, keys = (n if n > 1 else 0 for n in o.bias.shape[2:])
      extra = [(0, 0)] * 2 + [(0, -length % self.rows), (0, -keys % self.columns)]
      self.bias = jnp.pad(o.bias, extra)

  def visit(self, block: Array, step: Callable[[Array, bool, Any], Any], start: Any) -> Any:
    """Runs `carry = step(other, whether the pair needs a mask, carry)` for each visit of a block.

    Args:
      block: index of a block of queries (of keys if `by_keys`).
      step: gets the index of a block of the other side as `other`.
      start: the first carry.
    """
    for kind, (entries, count) in self._visits.items():
      other = lambda n, entries=entries: schedule.block_of(entries[block, n])[0]
      masked = kind == schedule.PARTIAL
      body = lambda n, carry, other=other, masked=masked: step(other(n), masked, carry)
      start = jax.lax.fori_loop(0, count[block], body, start)
    return start

  def logits(self, i: Array, j: Array, q: Array, masked: bool) -> Array:
    """Logits [B, K, G * rows, columns] of a block pair, -inf where a query doesn't see a key."""
    plain = _dot('BKLH,BKSH->BKLS', q, self.k[j])
    B, K, R, S = plain.shape
    grouped = plain.reshape(B, K, R // self.rows, self.rows, S)
    if self.bias is not None:
      start, sizes = self._window(i, j)
      bias = jax.lax.dynamic_slice(self.bias, start, sizes)
      whole = jnp.broadcast_to(bias, (B, grouped.shape[1] * grouped.shape[2], self.rows, S))
      grouped = grouped + whole.reshape(grouped.shape)
    if masked:
      mask = visible(self._cut(self._query, i, self.rows), self._cut(self._key, j, self.columns))
      grouped = jnp.where(mask[:, None, None], grouped, -jnp.inf)
    return grouped.reshape(plain.shape)

  def add_to_bias(self, total: Array | None, i: Array, j: Array, d_logits: Array) -> Array | None:
    """Adds a block pair's gradient, summed over the axes that the bias broadcasts over."""
    if total is None:
      return None
    start, sizes = self._window(i, j)
    B, K, R, S = d_logits.shape
    d_logits = d_logits.reshape(B, K * R // self.rows, self.rows, S)
    once = tuple(axis for axis in range(4) if sizes[axis] == 1)
    d_bias = jnp.sum(d_logits, once, keepdims=True)
    old = jax.lax.dynamic_slice(total, start, sizes)
    return jax.lax.dynamic_update_slice(total, old + d_bias, start)

  def _window(self, i: Array, j: Array) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Start and size of a block pair's part of the bias."""
    B, N, length, keys = self.bias.shape
    start = (0, 0, i * self.rows if length > 1 else 0, j * self.columns if keys > 1 else 0)
    return start, (B, N, min(length, self.rows), min(keys, self.columns))

  @staticmethod
  def _cut(tokens: Visibility, block: Array, size: int) -> Visibility:
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, block * size, size, 1)
    return jax.tree.map(take, tokens)

  @staticmethod
  def unfold(x: Array, shape: tuple[int, ...]) -> Array:
    """[I, B, K, G * rows, H] -> `shape`, which is [B, L, N, H]."""
    I, B, K, R, H = x.shape
    G = shape[2] // K
    x = x.reshape(I, B, K, G, R // G, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, K * G, H)[:, : shape[1]]

  @staticmethod
  def unfold_row(x: Array, shape: tuple[int, ...]) -> Array:
    """[I, B, K, G * rows] -> [B, N, L]."""
    I, B, K, R = x.shape
    G = shape[2] // K
    x = x.reshape(I, B, K, G, R // G).transpose(1, 2, 3, 0, 4)
    return x.reshape(B, K * G, -1)[:, :, : shape[1]]


def _at(x: Array, b: Array) -> Array:
  """One element of a batch, [1, ...]."""
  return jax.lax.dynamic_slice_in_dim(x, b, 1)


def _sequence(operands: Operands, b: Array) -> Operands:
  """One sequence of a batch; all may share a bias."""
  return jax.tree.map(lambda x: _at(x, b) if x.shape[0] > 1 else x, operands)


def _dot(equation: str, a: Array, b: Array) -> Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _fold(x: Array, K: int, block: int) -> Array:
  """[B, L, N, H] -> [blocks, B, K, N // K * block, H], padded with zeros."""
  B, L, N, H = x.shape
  count = -(-L // block)
  x = jnp.pad(x, ((0, 0), (0, count * block - L), (0, 0), (0, 0)))
  x = x.reshape(B, count, block, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
  return x.reshape(count, B, K, -1, H)


def _fold_row(x: Array, K: int, block: int) -> Array:
  """[B, N, L] -> [blocks, B, K, N // K * block], padded with zeros."""
  B, N, L = x.shape
  count = -(-L // block)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, count * block - L)))
  x = x.reshape(B, K, N // K, count, block).transpose(3, 0, 1, 2, 4)
  return x.reshape(count, B, K, -1)
