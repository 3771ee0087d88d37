"""Attention on NVIDIA GPUs: Pallas kernels (Triton) for the output, for dq, and for dk and dv.

One program works on one block of queries (for dk and dv: of keys) of one head. It loops only over
the blocks of keys (of queries) that the schedule lists for it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vpe_jax.contracts import Array, Visibility
from vpe_jax.ops.attention import schedule
from vpe_jax.ops.attention.blockwise import Gradients, Operands, attend

WIDEST = 256  # head width


def attention(
  q: Array, k: Array, v: Array, query: Visibility, key: Visibility
) -> tuple[Array, Array]:
  """Equals `reference.attention` within rounding, gradients included.

  Args:
    q: queries [B, L, N, H], H at most 256.
    k: keys [B, S, K, H].
    v: values [B, S, K, H].
    query: visibility of the queries [B, L].
    key: visibility of the keys [B, S].
  """
  sizes = next(sizes for width, sizes in SIZES.items() if q.shape[3] <= width)
  return attend(sizes, Operands(q, k, v, query, key))


@dataclasses.dataclass(frozen=True)
class Gpu:
  """The kernels at one size of blocks.

  Attributes:
    rows: queries of a block.
    columns: keys of a block.
    warps: number of warps (of 32 threads) that work on a block.
    stages: number of pipeline stages, which load blocks ahead.
    interpret: whether to interpret the kernels, without a GPU.
  """

  rows: int
  columns: int
  warps: int = 4
  stages: int = 2
  interpret: bool = False

  def forward(self, operands: Operands) -> tuple[Array, Array]:
    """See blockwise.Kernel."""
    x = _Inputs(self, operands, by_keys=False)
    out = {'q': x.arrays['q'], 'row': jax.ShapeDtypeStruct(x.arrays['q'].shape[:3], jnp.float32)}
    names = ('entries', 'count', 'q', 'k', 'v', 'query', 'key')
    mixed, lse = x.run(_attention_forward, names, out)
    return _from_kernel(mixed, operands.q.shape), lse[:, :, : operands.q.shape[1]]

  def backward(self, operands: Operands, d_mixed: Array, lse: Array, delta: Array) -> Gradients:
    """See blockwise.Kernel."""
    gradients: list[Array] = []
    for by_keys in (False, True):
      x = _Inputs(self, operands, by_keys)
      length = x.arrays['q'].shape[2]
      row = lambda y, length=length: jnp.pad(y, ((0, 0), (0, 0), (0, length - y.shape[2])))
      x.arrays |= {'d_mixed': _to_kernel(d_mixed, length), 'lse': row(lse), 'delta': row(delta)}
      names = ('entries', 'count', 'q', 'k', 'v', 'query', 'key', 'd_mixed', 'lse', 'delta')
      if by_keys:
        gradients += x.run(_attention_dkv, names, {'k': x.arrays['k'], 'v': x.arrays['v']})
      else:
        gradients += x.run(_attention_dq, names, {'q': x.arrays['q']})
    shapes = (operands.q.shape, operands.k.shape, operands.v.shape)
    return *(_from_kernel(x, shape) for x, shape in zip(gradients, shapes)), None


# Sizes up to a head width: the blocks have to fit registers and shared memory. Widths and blocks
# are powers of two, as Triton demands.
SIZES = {64: Gpu(128, 64, 4, 2), 128: Gpu(64, 64, 4, 3), WIDEST: Gpu(32, 32, 8, 2)}


class _Inputs:
  """The padded arrays of a call, [B, heads, tokens, H], and the part that a program reads.

  A program reads one block of keys if `by_keys`, else one block of queries, and all blocks of the
  other side. `entries` [B, blocks, visits] and `count` [B, blocks] list the blocks that each
  program visits.
  """

  def __init__(self, sizes: Gpu, operands: Operands, by_keys: bool) -> None:
    o, self.sizes, self.by_keys = operands, sizes, by_keys
    L, S = o.q.shape[1], o.k.shape[1]
    length, keys = -(-L // sizes.rows) * sizes.rows, -(-S // sizes.columns) * sizes.columns
    status = schedule.block_status(o.query, o.key, sizes.rows, sizes.columns)
    status = status.transpose(0, 2, 1) if by_keys else status
    tokens = lambda side, length: jnp.stack(jax.tree.leaves(schedule.padded(side, length)), 1)
    self.group = o.q.shape[2] // o.k.shape[2]
    self.arrays = {
      'entries': schedule.visits(status),
      'count': jnp.sum(status != schedule.SKIP, -1, dtype=jnp.int32),
      'q': _to_kernel(o.q, length),
      'k': _to_kernel(o.k, keys),
      'v': _to_kernel(o.v, keys),
      'query': tokens(o.query, length),
      'key': tokens(o.key, keys),
    }

  def run(self, body: Any, names: tuple[str, ...], out: dict[str, Any]) -> Any:
    """Calls a kernel on the arrays of these names; `out` maps kinds of arrays to their shapes."""
    q, k = self.arrays['q'], self.arrays['k']
    B, heads, length, _ = k.shape if self.by_keys else q.shape
    blocks = length // (self.sizes.columns if self.by_keys else self.sizes.rows)
    return pl.pallas_call(
      functools.partial(body, self.sizes, self.group),
      grid=(blocks, heads, B),
      in_specs=[self._spec(name) for name in names],
      out_specs=[self._spec(name) for name in out],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out.values()],
      compiler_params=triton.CompilerParams(
        num_warps=self.sizes.warps, num_stages=self.sizes.stages
      ),
      interpret=self.sizes.interpret,
      name=body.__name__.strip('_'),
    )(*(self.arrays[name] for name in names))

  def _spec(self, name: str) -> pl.BlockSpec:
    """The part of an array that one program sees."""
    group, by_keys = self.group, self.by_keys
    if name == 'entries':
      visits = self.arrays['entries'].shape[2]
      return pl.BlockSpec((None, None, visits), lambda block, head, b: (b, block, 0))
    if name == 'count':
      return pl.BlockSpec((None, None), lambda block, head, b: (b, block))
    of_keys = name in ('k', 'v', 'key')
    own = of_keys == by_keys
    size = self.sizes.columns if of_keys else self.sizes.rows
    size = size if own else self.arrays['k' if of_keys else 'q'].shape[2]
    at = lambda block: block if own else 0
    if name in ('query', 'key'):
      return pl.BlockSpec((None, 4, size), lambda block, head, b: (b, 0, at(block)))
    H = self.arrays['q'].shape[3]
    rest, zeros = ((), ()) if name in ('lse', 'delta', 'row') else ((H,), (0,))
    if own or by_keys:
      # A key head's program reads all query heads of its group.
      heads = group if by_keys and not own else None
      return pl.BlockSpec((None, heads, size, *rest), lambda block, h, b: (b, h, at(block), *zeros))
    return pl.BlockSpec((None, None, size, *rest), lambda block, h, b: (b, h // group, 0, *zeros))


def _to_kernel(x: Array, length: int) -> Array:
  """[B, L, N, H] -> [B, N, length, width], padded with zeros to a width that Triton accepts."""
  H = x.shape[3]
  pad = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, max(16, pl.next_power_of_2(H)) - H))
  return jnp.pad(x, pad).transpose(0, 2, 1, 3)


def _from_kernel(x: Array, shape: tuple[int, ...]) -> Array:
  """[B, N, L, H] -> `shape`, which is [B, L, N, H]."""
  return x.transpose(0, 2, 1, 3)[:, : shape[1], :, : shape[3]]


# Bodies of the kernels. Blocks of logits are [queries, keys].


def _product(a: Array, b: Array) -> Array:
  # Only products of float32 follow jax_default_matmul_precision.
  precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _part(ref: Any, start: Any, size: int) -> tuple[Array, ...]:
  """The four integers of Visibility for `size` tokens, each [size]."""
  return tuple(ref[n, pl.ds(start, size)] for n in range(4))


def _masked(logits: Array, query: tuple[Array, ...], key: tuple[Array, ...], full: Any) -> Array:
  order, since, reach, _ = (x[:, None] for x in query)
  place, until = key[0][None, :], key[3][None, :]
  mask = (since <= place) & (place < reach) & (order < until)
  return jnp.where(mask | full, logits, -jnp.inf)


def _attention_forward(sizes: Gpu, group: int, *refs: Any) -> None:
  del group
  entries, count, q_ref, k_ref, v_ref, query_ref, key_ref, mixed_ref, lse_ref = refs
  rows, columns = sizes.rows, sizes.columns
  q, query = q_ref[...], _part(query_ref, 0, rows)

  def step(n: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    top, total, mixed = carry
    j, status = schedule.block_of(entries[n])
    keys = pl.ds(j * columns, columns)
    logits = _product(q, k_ref[keys, :].T)
    key = _part(key_ref, j * columns, columns)
    logits = _masked(logits, query, key, status == schedule.FULL)
    new = jnp.maximum(top, jnp.max(logits, 1))
    # A query that has seen nothing yet stays at -inf; 0 in its place keeps exp() free of NaN.
    safe = jnp.where(new > -jnp.inf, new, 0.0)
    weights = jnp.exp(logits - safe[:, None])
    decay = jnp.exp(top - safe)
    v = v_ref[keys, :]
    mixed = mixed * decay[:, None] + _product(weights.astype(v.dtype), v)
    return new, total * decay + jnp.sum(weights, 1), mixed

  start = (
    jnp.full((rows,), -jnp.inf, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
    jnp.zeros(q.shape, jnp.float32),
  )
  top, total, mixed = jax.lax.fori_loop(0, count[...], step, start)
  safe = jnp.where(total > 0, total, 1.0)
  mixed_ref[...] = (mixed / safe[:, None]).astype(mixed_ref.dtype)
  lse_ref[...] = top + jnp.log(safe)


def _attention_dq(sizes: Gpu, group: int, *refs: Any) -> None:
  del group
  entries, count, q_ref, k_ref, v_ref, query_ref, key_ref, grad_ref, lse_ref, delta_ref, out = refs
  rows, columns = sizes.rows, sizes.columns
  q, d_mixed, query = q_ref[...], grad_ref[...], _part(query_ref, 0, rows)
  lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]

  def step(n: Any, d_q: Array) -> Array:
    j, status = schedule.block_of(entries[n])
    keys = pl.ds(j * columns, columns)
    k = k_ref[keys, :]
    key = _part(key_ref, j * columns, columns)
    logits = _masked(_product(q, k.T), query, key, status == schedule.FULL)
    d_weights = _product(d_mixed, v_ref[keys, :].T)
    d_logits = jnp.exp(logits - lse) * (d_weights - delta)
    return d_q + _product(d_logits.astype(k.dtype), k)

  d_q = jax.lax.fori_loop(0, count[...], step, jnp.zeros(q.shape, jnp.float32))
  out[...] = d_q.astype(out.dtype)


def _attention_dkv(sizes: Gpu, group: int, *refs: Any) -> None:
  entries, count, q_ref, k_ref, v_ref, query_ref, key_ref, grad_ref, lse_ref, delta_ref = refs[:10]
  rows, columns = sizes.rows, sizes.columns
  k, v, key = k_ref[...], v_ref[...], _part(key_ref, 0, columns)
  visits = count[...]

  def step(n: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    d_k, d_v = carry
    head, n = n // visits, n % visits
    i, status = schedule.block_of(entries[n])
    tokens = pl.ds(i * rows, rows)
    q, d_mixed = q_ref[head, tokens, :], grad_ref[head, tokens, :]
    query = _part(query_ref, i * rows, rows)
    logits = _masked(_product(q, k.T), query, key, status == schedule.FULL)
    weights = jnp.exp(logits - lse_ref[head, tokens][:, None])
    d_v += _product(weights.T.astype(d_mixed.dtype), d_mixed)
    d_weights = _product(d_mixed, v.T)
    d_logits = weights * (d_weights - delta_ref[head, tokens][:, None])
    return d_k + _product(d_logits.T.astype(q.dtype), q), d_v

  start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
  d_k, d_v = jax.lax.fori_loop(0, visits * group, step, start)
  refs[10][...] = d_k.astype(refs[10].dtype)
  refs[11][...] = d_v.astype(refs[11].dtype)
