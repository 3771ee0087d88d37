"""Mixture-of-Transformers: several experts, one attention (arXiv 2606.04457, Eq. 4).

Tokens are stored expert by expert: each expert's region is one static slice with its own dense
matmuls, and order, not storage, decides who sees whom. One expert alone is an ordinary decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax import sharding
from vpe_jax.contracts import Array, Params, Visibility, concatenate
from vpe_jax.models.transformer import Layer, RMSNorm
from vpe_jax.ops import rope
from vpe_jax.ops.attention import blockwise, chooser

_KeysValues = tuple[Any, Any] | None

_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(*blockwise.SAVED)
REMAT = {
  'none': None,
  'full': _policies.nothing_saveable,
  'attention': _attention,
  'dots': _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _attention),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
  """The tokens of one expert that a call processes.

  Attributes:
    x: embeddings or hidden states [B, L, D].
    positions: rotary positions [B, L].
    visibility: of these tokens [B, L].
    condition: of the modulation [B, 1, D], or None for rows that are not modulated.
    rotation: rotary tables [B, L, 1, H / 2], cosine and sine, in the place of those that the layer
      makes from `positions`; None: the layer's.
    memory: what each layer's cross-attention looks at (see `remember`), or None.
    keys: of the layers' dropout [B], one a row; None: nothing is dropped.
  """

  x: Array
  positions: Array
  visibility: Visibility
  condition: Array | None = None
  rotation: tuple[Array, Array] | None = None
  memory: Cache | None = None
  keys: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of a whole row, preallocated: what decoding and flow steps reuse.

  `k` and `v` are [layers, B, S, K, H] where parameters are stacked over layers, else tuples of
  [B, S, K, H]. `key` is the visibility of all S slots, known from the start; slots not yet
  written are never seen, as no query reaches their order before they are.
  """

  k: Any
  v: Any
  key: Visibility

  def map_batch(self, change: Callable[..., Array], *others: Cache) -> Cache:
    """The cache of `change(*leaves, axis)`: stacked layers are in front of the batch axis."""
    caches, axis = (self, *others), 0 if isinstance(self.k, tuple) else 1
    along = lambda place: lambda *leaves: change(*leaves, place)
    kv = jax.tree.map(along(axis), *((cache.k, cache.v) for cache in caches))
    return Cache(*kv, jax.tree.map(along(0), *(cache.key for cache in caches)))


def init_layers(layer: Layer, rng: Array) -> Params:
  """Parameters of `layer.config.layers` layers, stacked on a leading axis."""
  c = layer.config
  x = jnp.zeros((1, 1, c.width))
  tables = rope.rotary(jnp.zeros((1, 1), jnp.int32), c.head_width, c.rope_theta)
  condition = x if layer.modulated else None
  init = lambda key: layer.init(key, x, tables, condition)['params']
  return jax.vmap(init)(jax.random.split(rng, c.layers))


def unstack(params: Params) -> tuple[Params, ...]:
  """Stacked layer parameters as a tuple of single layers.

  Outside jit and once for fast decoding; inside it for a backward pass without a scan.
  """
  leaves, tree = jax.tree.flatten(params)
  layers = zip(*(_apart(leaf) for leaf in leaves), strict=True)
  return tuple(jax.tree.unflatten(tree, layer) for layer in layers)


@jax.custom_vjp
def _apart(leaf: Array) -> tuple[Array, ...]:
  """The entries of the leading axis.

  Their gradients are stacked as they are; of an index, JAX would make each a whole leaf of zeros
  around one layer's, and add those up.
  """
  return tuple(leaf[i] for i in range(leaf.shape[0]))


def _apart_forward(leaf: Array) -> tuple[tuple[Array, ...], None]:
  return _apart(leaf), None


def _apart_backward(_: None, gradients: tuple[Array, ...]) -> tuple[Array]:
  return (jnp.stack(gradients),)


_apart.defvjp(_apart_forward, _apart_backward)


def empty_cache(layer: Layer, params: Any, key: Visibility, dtype: jnp.dtype) -> Cache:
  """A cache for rows of visibility `key` [B, S], in the layout (stacked or not) of `params`."""
  c = layer.config
  shape = (*key.order.shape, c.kv_heads, c.head_width)
  if isinstance(params, tuple):
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in params)
  else:
    zeros = lambda: jnp.zeros((c.layers, *shape), dtype)
  return Cache(zeros(), zeros(), key)


def remember(layer: Layer, params: Any, told: Stream) -> Cache:
  """Keys and values of each layer's cross-attention to the hidden states `told.x`."""
  tables = _tables(layer, told)
  one = lambda weights: layer.apply({'params': weights}, told.x, tables, method='remember')
  if isinstance(params, tuple):
    k, v = zip(*map(one, params), strict=True)
  else:
    k, v = jax.vmap(one)(params)
  return Cache(k, v, told.visibility)


def run(
  layers: Mapping[str, Layer],
  params: Mapping[str, Any],
  streams: Mapping[str, Stream],
  cache: Cache | None = None,
  at: Array | int = 0,
  remat: str = 'none',
  attention: str = '',
) -> tuple[dict[str, Array], Cache | None]:
  """Runs the experts' stacks side by side over one attention in each layer.

  Args:
    layers: the layer module of each expert.
    params: per expert, layer parameters stacked on a leading axis, or a tuple of single layers.
      Two experts may share one entry's arrays (`arch=single`).
    streams: per expert, its tokens; experts without tokens in this call are left out.
    cache: keys and values of the whole row. The streams' own are written at slot `at` (in the
      order of `streams`) before attention; without a cache the streams see each other only.
    at: first slot to write.
    remat: what the backward pass recomputes, a key of REMAT.
    attention: implementation, a name of `config.ATTENTIONS`; '' chooses, as calls of a few tokens
      (decoding) always do.

  Returns:
    Hidden states of each stream after the last layer, not normalised, and the written cache.
  """
  query = concatenate([stream.visibility for stream in streams.values()])
  call = _Call(
    layers,
    tables={name: _tables(layers[name], stream) for name, stream in streams.items()},
    conditions={name: stream.condition for name, stream in streams.items()},
    memories={n: (s.visibility, s.memory.key) for n, s in streams.items() if s.memory},
    query=query,
    key=query if cache is None else cache.key,
    at=at,
    attention=attention if query.order.shape[1] >= chooser.SHORT else '',
  )

  def one(
    hidden: dict[str, Array],
    weights: Mapping[str, Params],
    memories: Mapping[str, tuple[Any, Any]],
    keys: Mapping[str, Array],
    held: _KeysValues,
  ) -> Any:
    hidden = {n: sharding.constrain(x, ('batch', None, None)) for n, x in hidden.items()}
    return _layer(call, weights, memories, keys, hidden, held)

  if REMAT[remat] is not None:
    one = jax.checkpoint(one, policy=REMAT[remat])
  hidden = {name: stream.x for name, stream in streams.items()}
  chosen = {name: params[name] for name in streams}
  held = None if cache is None else (cache.k, cache.v)
  memories = {n: (s.memory.k, s.memory.v) for n, s in streams.items() if s.memory}
  keys = {n: _of_layers(layers[n], s.keys) for n, s in streams.items() if s.keys is not None}
  if any(isinstance(stack, tuple) for stack in chosen.values()):
    hidden, held = _unrolled(one, hidden, chosen, memories, keys, held)
  else:
    hidden, held = jax.lax.scan(lambda h, x: one(h, *x), hidden, (chosen, memories, keys, held))
  return hidden, None if cache is None else Cache(held[0], held[1], cache.key)


@dataclasses.dataclass(frozen=True)
class OneExpert:
  """A network of one expert; its parameters have `layers` (stacked) and `norm`.

  It holds no arrays: every method is a pure function of the parameters.

  Attributes:
    config: its sizes, of which `body` are those of the layers.
    dtype: what it computes in.
    remat: as in `run`.
    attention: as in `run`.
  """

  config: Any
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  attention: str = ''

  @property
  def layer(self) -> Layer:
    """The layer module, which `empty_cache` asks for."""
    return Layer(self.config.body, self.dtype)

  def prepare(self, params: Params) -> Params:
    """Stacked layers taken apart: outside jit for decoding, inside it for unrolled training."""
    return {**params, 'layers': unstack(params['layers'])}

  def states(
    self, params: Params, stream: Stream, cache: Cache | None = None, at: Array | int = 0
  ) -> tuple[Array, Cache | None]:
    """Final-norm hidden states [B, L, D] and the written cache.

    `cache` and `at` are those of `run`.
    """
    layers, stacks = {'row': self.layer}, {'row': params['layers']}
    hidden, cache = run(layers, stacks, {'row': stream}, cache, at, self.remat, self.attention)
    norm = RMSNorm(self.config.body.eps)
    return norm.apply({'params': params['norm']}, hidden['row']), cache


@dataclasses.dataclass(frozen=True)
class _Call:
  """Inputs that all layers of one `run` share."""

  layers: Mapping[str, Layer]
  tables: Mapping[str, tuple[Array, Array]]
  conditions: Mapping[str, Array | None]
  memories: Mapping[str, tuple[Visibility, Visibility]]
  query: Visibility
  key: Visibility
  at: Array | int
  attention: str


def _tables(layer: Layer, stream: Stream) -> tuple[Array, Array]:
  if stream.rotation is not None:
    return stream.rotation
  c = layer.config
  return rope.rotary(stream.positions, c.head_width, c.rope_theta, c.rope_scaling)


def _of_layers(layer: Layer, keys: Array) -> Array:
  """Keys [layers, B] from those of the rows [B]."""
  return jax.vmap(lambda key: jax.random.split(key, layer.config.layers), out_axes=1)(keys)


def _unrolled(
  one: Any,
  hidden: dict[str, Array],
  params: Mapping[str, Any],
  memories: Mapping[str, tuple[Any, Any]],
  keys: Mapping[str, Array],
  held: _KeysValues,
) -> tuple[dict[str, Array], _KeysValues]:
  """The layer loop over unstacked parameters and caches."""
  written = []
  for i in range(len(next(iter(params.values())))):
    weights = {name: stack[i] for name, stack in params.items()}
    seen = {name: (k[i], v[i]) for name, (k, v) in memories.items()}
    own = {name: layers[i] for name, layers in keys.items()}
    kv = None if held is None else (held[0][i], held[1][i])
    hidden, kv = one(hidden, weights, seen, own, kv)
    written.append(kv)
  if held is None:
    return hidden, None
  return hidden, (tuple(k for k, _ in written), tuple(v for _, v in written))


def _layer(
  call: _Call,
  weights: Mapping[str, Params],
  memories: Mapping[str, tuple[Array, Array]],
  keys: Mapping[str, Array],
  hidden: dict[str, Array],
  held: _KeysValues,
) -> tuple[dict[str, Array], _KeysValues]:
  """Eq. 4: own projections, one attention over all keys, own output projection and MLP.

  An expert with a memory looks at it between the two halves.
  """
  projected, modulation = {}, {}
  for name in call.tables:  # The order of the streams: a scan sorts what it carries by name.
    x = hidden[name]
    variables, condition = {'params': weights[name]}, call.conditions[name]
    layer = call.layers[name]
    modulation[name] = (
      None if condition is None else layer.apply(variables, condition, method='modulate')
    )
    projected[name] = layer.apply(
      variables, x, call.tables[name], modulation[name], method='project'
    )
  q, k, v = (jnp.concatenate(parts, 1) for parts in zip(*projected.values(), strict=True))
  if held is not None:
    held = tuple(
      jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), call.at, 1)
      for old, new in zip(held, (k, v), strict=True)
    )
    k, v = held
  mixed = chooser.attention(q, k, v, call.query, call.key, call.attention)
  out, start = {}, 0
  for name in call.tables:
    x = hidden[name]
    stop = start + x.shape[1]
    out[name] = call.layers[name].apply(
      {'params': weights[name]},
      x,
      mixed[:, start:stop],
      modulation[name],
      *(_looking(call, name, memories[name]) if name in memories else ()),
      keys=keys.get(name),
      method='finish',
    )
    start = stop
  return out, held


def _looking(
  call: _Call, name: str, memory: tuple[Array, Array]
) -> tuple[tuple[Array, Array], Callable[[Array], Array]]:
  """Arguments of Layer.finish for cross-attention."""
  query, key = call.memories[name]
  attend = lambda q: chooser.attention(q, *memory, query, key, call.attention)
  return call.tables[name], attend
