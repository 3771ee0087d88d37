"""Attention on TPU: Pallas kernels for the output, for dq, and for dk and dv.

Everything inside is transposed. Heads are [H, L], so no head width is padded to 128 lanes. A block
of logits is [keys, queries], so values per query (maximum, sum, log-sum-exp) are a row, as they are
stored. The schedule comes in through scalar prefetch: block index maps read from it which block to
fetch next, and a skipped pair costs neither a fetch nor arithmetic. The batch is an axis of the
grid (`vmap` would turn the kernel into a loop).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vpe_jax.contracts import Array, Visibility
from vpe_jax.ops.attention import schedule
from vpe_jax.ops.attention.blockwise import Gradients, Operands, attend
from vpe_jax.ops.attention.chunked import even

LANES = 128
WIDEST = 256  # head width
# Kind of device -> queries (rows) and keys (columns) of a block. In bfloat16, a visit fetches
# 4 * columns * H bytes of keys and values for 4 * rows * columns * H FLOPs; the arithmetic takes
# longer than the fetch from 240 queries on v5e and 560 on v6e. Logits of a block and their
# exponentials, in float32, have to fit the compiler's share of VMEM (16 MB on v4 and v5e).
TILES = {
  'TPU v4': (512, 512),
  'TPU v5 lite': (512, 512),
  'TPU v5e': (512, 512),
  'TPU v5': (512, 1024),
  'TPU v5p': (512, 1024),
  'TPU v6 lite': (1024, 1024),
  'TPU v6e': (1024, 1024),
}
_SMALLEST_TILE = (512, 512)  # smallest tile in TILES, for kinds of devices that it lacks
_SMEM = 512 * 1024  # maximum bytes of a schedule table; a core has 1 MB of scalar memory
_PACKED = 2  # entries of a schedule in one word


def attention(
  q: Array, k: Array, v: Array, query: Visibility, key: Visibility, kind: str = ''
) -> tuple[Array, Array]:
  """Equals `reference.attention` within rounding, gradients included.

  Args:
    q: queries [B, L, N, H], H at most 256.
    k: keys [B, S, K, H].
    v: values [B, S, K, H].
    query: visibility of the queries [B, L].
    key: visibility of the keys [B, S].
    kind: kind of the devices; one that TILES lacks gets the smallest tile.
  """
  rows, columns = TILES.get(kind, _SMALLEST_TILE)
  kernel = Tpu(even(q.shape[1], rows, LANES), even(k.shape[1], columns, LANES))
  return attend(kernel, Operands(q, k, v, query, key))


@dataclasses.dataclass(frozen=True)
class Tpu:
  """The kernels at one size of blocks; `interpret` runs them without a TPU."""

  rows: int
  columns: int
  interpret: bool = False

  def forward(self, operands: Operands) -> tuple[Array, Array]:
    """See blockwise.Kernel."""
    return _by_batch(functools.partial(_forward, self), self, operands)

  def backward(self, operands: Operands, d_mixed: Array, lse: Array, delta: Array) -> Gradients:
    """See blockwise.Kernel."""
    run = functools.partial(_backward, self)
    return *_by_batch(run, self, operands, d_mixed, lse, delta), None


def _by_batch(run: Any, sizes: Tpu, operands: Operands, *more: Array) -> Any:
  """Runs a whole batch at once, or in parts whose schedule fits into scalar memory."""
  B, L, S = operands.q.shape[0], operands.q.shape[1], operands.k.shape[1]
  I, J = -(-L // sizes.rows), -(-S // sizes.columns)
  words = max(I * -(-J // _PACKED), J * -(-I // _PACKED))  # of one sequence; by queries, by keys
  most = max(1, _SMEM // (4 * words))
  inputs = (operands, *more)
  parts = [
    run(*jax.tree.map(lambda x, start=start: x[start : start + most], inputs))
    for start in range(0, B, most)
  ]
  return jax.tree.map(lambda *x: x[0] if len(x) == 1 else jnp.concatenate(x), *parts)


@dataclasses.dataclass(frozen=True)
class _Call:
  """Static parameters of one kernel call, with I blocks of queries and J blocks of keys.

  The grid's last axis runs over visits: of key blocks for a block of queries or, if `by_keys`, of
  query blocks for a block of keys (times the query heads of its group).
  """

  sizes: Tpu
  shape: tuple[int, int, int, int, int, int]  # B, N, K, H, I, J
  dtype: Any
  by_keys: bool = False

  @property
  def grid(self) -> tuple[int, ...]:
    B, N, K, _, I, J = self.shape
    return (B, K, J, N // K * I) if self.by_keys else (B, N, I, J)

  def entry(self, table: Any, b: Any, fixed: Any, step: Any) -> tuple[Any, Any]:
    """The block that a step visits, and the status of the pair."""
    _, _, _, _, I, J = self.shape
    fixed_count, count = (J, I) if self.by_keys else (I, J)
    n = jax.lax.rem(step, count) if self.by_keys else step
    words = -(-count // _PACKED)
    word = table[(b * fixed_count + fixed) * words + n // _PACKED]
    return schedule.block_of((word >> (16 * (n % _PACKED))) & 0xFFFF)

  def place(self, b: Any, head: Any, fixed: Any, step: Any, table: Any) -> tuple[Any, ...]:
    """Query head, key/value head, query block and key block of a grid step."""
    _, N, K, _, I, _ = self.shape
    visited, _ = self.entry(table, b, fixed, step)
    if self.by_keys:
      return head * (N // K) + step // I, head, visited, fixed
    return head, head // (N // K), fixed, visited

  def specs(self) -> dict[str, pl.BlockSpec]:
    """How each kind of array is cut: blocks of queries and of keys, per head or for all heads."""
    H, rows, columns = self.shape[3], self.sizes.rows, self.sizes.columns

    def query_head(b: Any, head: Any, fixed: Any, step: Any, table: Any) -> tuple[Any, ...]:
      n, _, i, _ = self.place(b, head, fixed, step, table)
      return b, n, 0, i

    def key_head(b: Any, head: Any, fixed: Any, step: Any, table: Any) -> tuple[Any, ...]:
      _, k, _, j = self.place(b, head, fixed, step, table)
      return b, k, 0, j

    def query(b: Any, head: Any, fixed: Any, step: Any, table: Any) -> tuple[Any, ...]:
      return b, 0, self.place(b, head, fixed, step, table)[2]

    def key(b: Any, head: Any, fixed: Any, step: Any, table: Any) -> tuple[Any, ...]:
      return b, 0, self.place(b, head, fixed, step, table)[3]

    return {
      'q': pl.BlockSpec((None, None, H, rows), query_head),
      'row': pl.BlockSpec((None, None, 1, rows), query_head),
      'kv': pl.BlockSpec((None, None, H, columns), key_head),
      'query': pl.BlockSpec((None, 4, rows), query),
      'key': pl.BlockSpec((None, 4, columns), key),
    }

  def run(self, body: Any, inputs: list[tuple[str, Array]], out: Any, scratch: Any) -> Any:
    """Calls a kernel; `out` lists (kind, shape and dtype), `inputs` (kind, array)."""
    specs = self.specs()
    table, *arrays = (array for _, array in inputs)
    kinds = [kind for kind, _ in inputs[1:]]
    _, _, _, H, I, J = self.shape
    steps = self.grid[0] * self.shape[1] * I * J
    logits = steps * self.sizes.rows * self.sizes.columns
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    moved += sum(o.size * o.dtype.itemsize for _, o in out)
    return pl.pallas_call(
      functools.partial(body, self),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=self.grid,
        in_specs=[specs[kind] for kind in kinds],
        out_specs=[specs[kind] for kind, _ in out],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
      ),
      out_shape=[shape for _, shape in out],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
      ),
      cost_estimate=pl.CostEstimate(
        # An upper bound: the number of visited pairs is known only at run time.
        flops=2 * _PRODUCTS[body] * logits * H,
        transcendentals=logits,
        bytes_accessed=moved,
      ),
      interpret=self.sizes.interpret,
      name=body.__name__.strip('_'),
    )(table, *arrays)


def _prepare(sizes: Tpu, operands: Operands, by_keys: bool) -> tuple[_Call, dict[str, Array]]:
  """Static parameters of a call, and its inputs: transposed and padded, with a packed schedule."""
  o = operands
  B, L, N, H = o.q.shape
  S, K = o.k.shape[1], o.k.shape[2]
  I, J = -(-L // sizes.rows), -(-S // sizes.columns)
  status = schedule.block_status(o.query, o.key, sizes.rows, sizes.columns)
  table = _pack(schedule.visits(status.transpose(0, 2, 1) if by_keys else status))
  tokens = lambda side, length: jnp.stack(jax.tree.leaves(schedule.padded(side, length)), 1)
  inputs = {
    'table': table,
    'q': _to_kernel(o.q, I * sizes.rows),
    'k': _to_kernel(o.k, J * sizes.columns),
    'v': _to_kernel(o.v, J * sizes.columns),
    'query': tokens(o.query, I * sizes.rows),
    'key': tokens(o.key, J * sizes.columns),
  }
  return _Call(sizes, (B, N, K, _width(H), I, J), o.q.dtype, by_keys), inputs


def _width(H: int) -> int:
  """The head width, rounded up to whole tiles of 16 sublanes, the size for bfloat16."""
  return -(-H // 16) * 16


def _to_kernel(x: Array, length: int) -> Array:
  """[B, L, N, H] -> [B, N, width, length], padded with zeros."""
  pad = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, _width(x.shape[3]) - x.shape[3]))
  return jnp.pad(x, pad).transpose(0, 2, 3, 1)


def _from_kernel(x: Array, shape: tuple[int, ...]) -> Array:
  """[B, N, H, L] -> `shape`, which is [B, L, N, H]."""
  return x.transpose(0, 3, 1, 2)[:, : shape[1], :, : shape[3]]


def _row(x: Array, length: int) -> Array:
  """[B, N, L] -> [B, N, 1, length], padded with zeros."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])))[:, :, None]


def _pack(entries: Array) -> Array:
  """Packs schedule entries [B, I, J], two to a word, into a flat array, which needs no tiles."""
  B, I, J = entries.shape
  entries = jnp.pad(entries, ((0, 0), (0, 0), (0, -J % _PACKED))).reshape(B, I, -1, _PACKED)
  return (entries[..., 0] | (entries[..., 1] << 16)).reshape(-1)


def _forward(sizes: Tpu, operands: Operands) -> tuple[Array, Array]:
  call, x = _prepare(sizes, operands, by_keys=False)
  B, N, _, H, _, _ = call.shape
  rows = x['q'].shape[3]
  inputs = [('table', x['table']), ('q', x['q']), ('kv', x['k']), ('kv', x['v'])]
  inputs += [('query', x['query']), ('key', x['key'])]
  out = [
    ('q', jax.ShapeDtypeStruct(x['q'].shape, operands.q.dtype)),
    ('row', jax.ShapeDtypeStruct((B, N, 1, rows), jnp.float32)),
  ]
  scratch = [(H, sizes.rows), (1, sizes.rows), (1, sizes.rows)]
  mixed, lse = call.run(_attention_forward, inputs, out, scratch)
  return _from_kernel(mixed, operands.q.shape), lse[:, :, 0, : operands.q.shape[1]]


def _backward(
  sizes: Tpu, operands: Operands, d_mixed: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
  gradients = []
  for by_keys in (False, True):
    call, x = _prepare(sizes, operands, by_keys)
    H = call.shape[3]
    rows = x['q'].shape[3]
    inputs = [('table', x['table']), ('q', x['q']), ('kv', x['k']), ('kv', x['v'])]
    inputs += [('query', x['query']), ('key', x['key']), ('q', _to_kernel(d_mixed, rows))]
    inputs += [('row', _row(lse, rows)), ('row', _row(delta, rows))]
    like = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)
    if by_keys:
      out = [('kv', like(x['k'])), ('kv', like(x['v']))]
      gradients += call.run(_attention_dkv, inputs, out, [(H, sizes.columns)] * 2)
    else:
      gradients += call.run(_attention_dq, inputs, [('q', like(x['q']))], [(H, sizes.rows)])
  shapes = (operands.q.shape, operands.k.shape, operands.v.shape)
  return tuple(_from_kernel(x, shape) for x, shape in zip(gradients, shapes))


# Bodies of the kernels. Blocks of q, k, v and their gradients are [H, tokens], logits
# [keys, queries], and values per query [1, queries].


def _visit(call: _Call, table: Any, one: Any) -> Any:
  """Runs `one(masked)` where this grid step's pair is visited."""
  _, status = call.entry(table, pl.program_id(0), pl.program_id(2), pl.program_id(3))
  pl.when(status == schedule.PARTIAL)(functools.partial(one, True))
  pl.when(status == schedule.FULL)(functools.partial(one, False))


def _logits(q: Any, k: Any, query: Any, key: Any, masked: bool) -> Array:
  logits = _product(k[...], q[...], 0, 0)
  if not masked:
    return logits
  order, since, reach, _ = (query[n : n + 1, :] for n in range(4))
  keys = jnp.swapaxes(key[...], 0, 1)  # [columns, 4]
  place, until = keys[:, 0:1], keys[:, 3:4]
  mask = (since <= place) & (place < reach) & (order < until)
  return jnp.where(mask, logits, -jnp.inf)


def _product(a: Array, b: Array, left: int, right: int) -> Array:
  """Contracts axis `left` of a with axis `right` of b, in float32."""
  # Only products of float32 follow jax_default_matmul_precision: the compiler refuses higher
  # precisions for bfloat16.
  precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    a,
    b,
    (((left,), (right,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _attention_forward(call: _Call, table: Any, *refs: Any) -> None:
  q, k, v, query, key, mixed, lse, acc, top, total = refs
  step, last = pl.program_id(3), call.grid[3] - 1

  @pl.when(step == 0)
  def _start() -> None:
    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.full_like(top, -jnp.inf)
    total[...] = jnp.zeros_like(total)

  def one(masked: bool) -> None:
    logits = _logits(q, k, query, key, masked)
    new = jnp.maximum(top[...], jnp.max(logits, 0, keepdims=True))
    # A query that has seen nothing yet stays at -inf; 0 in its place keeps exp() free of NaN.
    safe = jnp.where(new > -jnp.inf, new, 0.0)
    weights = jnp.exp(logits - safe)
    decay = jnp.exp(top[...] - safe)
    total[...] = total[...] * decay + jnp.sum(weights, 0, keepdims=True)
    acc[...] = acc[...] * decay + _product(v[...], weights.astype(v.dtype), 1, 0)
    top[...] = new

  _visit(call, table, one)

  @pl.when(step == last)
  def _finish() -> None:
    safe = jnp.where(total[...] > 0, total[...], 1.0)
    mixed[...] = (acc[...] / safe).astype(mixed.dtype)
    lse[...] = top[...] + jnp.log(safe)


def _attention_dq(call: _Call, table: Any, *refs: Any) -> None:
  q, k, v, query, key, d_mixed, lse, delta, d_q, acc = refs
  step, last = pl.program_id(3), call.grid[3] - 1

  @pl.when(step == 0)
  def _start() -> None:
    acc[...] = jnp.zeros_like(acc)

  def one(masked: bool) -> None:
    weights = jnp.exp(_logits(q, k, query, key, masked) - lse[...])
    d_weights = _product(v[...], d_mixed[...], 0, 0)
    d_logits = weights * (d_weights - delta[...])
    acc[...] += _product(k[...], d_logits.astype(k.dtype), 1, 0)

  _visit(call, table, one)

  @pl.when(step == last)
  def _finish() -> None:
    d_q[...] = acc[...].astype(d_q.dtype)


def _attention_dkv(call: _Call, table: Any, *refs: Any) -> None:
  q, k, v, query, key, d_mixed, lse, delta, d_k, d_v, acc_k, acc_v = refs
  step, last = pl.program_id(3), call.grid[3] - 1

  @pl.when(step == 0)
  def _start() -> None:
    acc_k[...] = jnp.zeros_like(acc_k)
    acc_v[...] = jnp.zeros_like(acc_v)

  def one(masked: bool) -> None:
    weights = jnp.exp(_logits(q, k, query, key, masked) - lse[...])
    acc_v[...] += _product(d_mixed[...], weights.astype(d_mixed.dtype), 1, 1)
    d_weights = _product(v[...], d_mixed[...], 0, 0)
    d_logits = weights * (d_weights - delta[...])
    acc_k[...] += _product(q[...], d_logits.astype(q.dtype), 1, 1)

  _visit(call, table, one)

  @pl.when(step == last)
  def _finish() -> None:
    d_k[...] = acc_k[...].astype(d_k.dtype)
    d_v[...] = acc_v[...].astype(d_v.dtype)


# Number of matrix products per visited pair of blocks.
_PRODUCTS = {_attention_forward: 2, _attention_dq: 3, _attention_dkv: 4}
