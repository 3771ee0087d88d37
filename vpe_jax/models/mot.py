"""Mixture-of-Transformers: several experts, one attention (arXiv 2606.04457, Eq. 4).

Tokens are stored expert by expert: each expert's region is one static slice with its own dense
matmuls. The logical order of tokens, not the order of storage, decides who sees whom. One expert
alone is an ordinary decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax import sharding
from vpe_jax.contracts import Array, Params, Visibility, concatenate
from vpe_jax.models.taps import Tapped, Taps
from vpe_jax.models.transformer import Layer, RMSNorm
from vpe_jax.ops import rope
from vpe_jax.ops.attention import blockwise, chooser

_KeysValues = tuple[Any, Any] | None
_Carry = tuple[dict[str, Array], dict[str, Tapped]]  # hidden states, and buffers of tapped states

_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(*blockwise.SAVED)
# Policies of jax.checkpoint, by name: the values saved for the backward pass; None saves all.
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
    visibility: visibility of these tokens [B, L].
    condition: input of the modulation [B, 1, D]; None for tokens that are not modulated.
    rotation: cosine and sine tables [B, L, 1, H / 2]; None: computed from `positions`.
    context: keys and values of each layer's cross-attention (see `context_kv`), or None.
    dropout_keys: random keys of dropout in the layers [B], one per sequence; None: nothing is
      dropped.
  """

  x: Array
  positions: Array
  visibility: Visibility
  condition: Array | None = None
  rotation: tuple[Array, Array] | None = None
  context: Cache | None = None
  dropout_keys: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of a whole sequence, preallocated; decoding and flow steps reuse them.

  `k` and `v` are [layers, B, S, K, H] where parameters are stacked over layers, else tuples of
  [B, S, K, H]. `visibility` is that of all S slots, known from the start. A slot isn't seen before
  it is written, because the `reach` of earlier queries is at most its order.
  """

  k: Any
  v: Any
  visibility: Visibility

  def map_batch(self, change: Callable[..., Array], *others: Cache) -> Cache:
    """Applies `change(*leaves, axis)` to the leaves of all caches; `axis` is their batch axis."""
    caches, axis = (self, *others), 0 if isinstance(self.k, tuple) else 1
    along = lambda axis: lambda *leaves: change(*leaves, axis)
    kv = jax.tree.map(along(axis), *((cache.k, cache.v) for cache in caches))
    return Cache(*kv, jax.tree.map(along(0), *(cache.visibility for cache in caches)))


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

  For fast decoding, call it once, outside jit; for a backward pass without a scan, inside jit.
  """
  leaves, tree = jax.tree.flatten(params)
  layers = zip(*(_entries(leaf) for leaf in leaves), strict=True)
  return tuple(jax.tree.unflatten(tree, layer) for layer in layers)


@jax.custom_vjp
def _entries(leaf: Array) -> tuple[Array, ...]:
  """The entries of the leading axis; the gradient stacks their gradients.

  JAX's own gradient would pad each entry's gradient with zeros to the shape of the leaf, and sum
  the results over all entries.
  """
  return tuple(leaf[i] for i in range(leaf.shape[0]))


def _entries_forward(leaf: Array) -> tuple[tuple[Array, ...], None]:
  return _entries(leaf), None


def _entries_backward(_: None, gradients: tuple[Array, ...]) -> tuple[Array]:
  return (jnp.stack(gradients),)


_entries.defvjp(_entries_forward, _entries_backward)


def empty_cache(layer: Layer, params: Any, key: Visibility, dtype: jnp.dtype) -> Cache:
  """An empty cache for sequences of visibility `key` [B, S].

  It is stacked over layers if `params` are, else it has a tuple of layers.
  """
  c = layer.config
  shape = (*key.order.shape, c.kv_heads, c.head_width)
  if isinstance(params, tuple):
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in params)
  else:
    zeros = lambda: jnp.zeros((c.layers, *shape), dtype)
  return Cache(zeros(), zeros(), key)


def context_kv(layer: Layer, params: Any, context: Stream) -> Cache:
  """Keys and values of each layer's cross-attention to the hidden states `context.x`."""
  tables = _tables(layer, context)
  one = lambda weights: layer.apply({'params': weights}, context.x, tables, method='context_kv')
  if isinstance(params, tuple):
    k, v = zip(*map(one, params), strict=True)
  else:
    k, v = jax.vmap(one)(params)
  return Cache(k, v, context.visibility)


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
      Experts may share arrays (`arch=single`).
    streams: per expert, its tokens; experts without tokens in this call are left out.
    cache: keys and values of the whole sequence. Those of the streams are written from slot `at`
      on, in the order of `streams`, before attention. Without a cache, the streams see each other
      only.
    at: first slot to write.
    remat: what the backward pass recomputes, a key of REMAT.
    attention: implementation, a name of `config.ATTENTIONS`; '' chooses automatically. Calls with
      fewer than chooser.SHORT tokens (decoding) ignore the name.

  Returns:
    Hidden states [B, L, D] of each stream after the last layer, not normalised, and the written
    cache.
  """
  return run_tapped(layers, params, streams, {}, cache, at, remat, attention)[:2]


def run_tapped(
  layers: Mapping[str, Layer],
  params: Mapping[str, Any],
  streams: Mapping[str, Stream],
  taps: Mapping[str, Taps],
  cache: Cache | None = None,
  at: Array | int = 0,
  remat: str = 'none',
  attention: str = '',
) -> tuple[dict[str, Array], Cache | None, dict[str, Tapped]]:
  """`run` that also returns inner states.

  Args:
    layers: see `run`.
    params: see `run`.
    streams: see `run`.
    taps: per expert, the inner states to return; experts without taps are left out.
    cache: see `run`.
    at: see `run`.
    remat: see `run`.
    attention: see `run`.

  Returns:
    The outputs of `run`, and the inner states of each expert in `taps`.

  Raises:
    UserError: an expert lacks a layer that its taps name.
    ValueError: an expert in `taps` has no stream, or taps are normed: layers have no final norm.
  """
  _check_taps(layers, streams, taps)
  query = concatenate([stream.visibility for stream in streams.values()])
  call = _Call(
    layers,
    tables={name: _tables(layers[name], stream) for name, stream in streams.items()},
    conditions={name: stream.condition for name, stream in streams.items()},
    contexts={n: (s.visibility, s.context.visibility) for n, s in streams.items() if s.context},
    query=query,
    key=query if cache is None else cache.visibility,
    at=at,
    attention=attention if query.order.shape[1] >= chooser.SHORT else '',
    taps=taps,
  )

  def one(
    hidden: dict[str, Array],
    weights: Mapping[str, Params],
    contexts: Mapping[str, tuple[Any, Any]],
    keys: Mapping[str, Array],
    cached: _KeysValues,
  ) -> Any:
    hidden = {n: sharding.constrain(x, ('batch', None, None)) for n, x in hidden.items()}
    return _layer(call, weights, contexts, keys, hidden, cached)

  if REMAT[remat] is not None:
    one = jax.checkpoint(one, policy=REMAT[remat])

  def step(carry: _Carry, inputs: tuple[Any, ...]) -> tuple[_Carry, _KeysValues]:
    (hidden, buffers), (*rest, slots) = carry, inputs
    hidden, cached, kv = one(hidden, *rest)
    states = {n: t.select(hidden[n], *kv.get(n, ())) for n, t in taps.items()}
    return (hidden, {n: buffers[n].write(states[n], slots[n]) for n in taps}), cached

  hidden = {name: stream.x for name, stream in streams.items()}
  inputs = (
    {name: params[name] for name in streams},
    {n: (s.context.k, s.context.v) for n, s in streams.items() if s.context},
    {n: _of_layers(layers[n], keys) for n, keys in _dropout_keys(streams).items()},
    None if cache is None else (cache.k, cache.v),
    {n: t.slots(layers[n].config.layers) for n, t in taps.items()},
  )
  carry = hidden, {n: _buffers(layers[n], t, hidden[n]) for n, t in taps.items()}
  unstacked = any(isinstance(stack, tuple) for stack in inputs[0].values())
  (hidden, tapped), cached = (_unrolled if unstacked else jax.lax.scan)(step, carry, inputs)
  return hidden, None if cache is None else Cache(*cached, cache.visibility), tapped


@dataclasses.dataclass(frozen=True)
class OneExpert:
  """A network of one expert, whose parameters have `layers` (stacked) and `norm`.

  It holds no arrays: every method is a pure function of the parameters.

  Attributes:
    config: sizes of the network; `config.body` has those of the layers.
    dtype: compute dtype.
    remat: as in `run`.
    attention: as in `run`.
  """

  config: Any
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  attention: str = ''

  @property
  def layer(self) -> Layer:
    """The layer module, an argument of `empty_cache`."""
    return Layer(self.config.body, self.dtype)

  def prepare(self, params: Params) -> Params:
    """Unstacks the layers: outside jit for decoding, inside it for unrolled training."""
    return {**params, 'layers': unstack(params['layers'])}

  def states(
    self, params: Params, stream: Stream, cache: Cache | None = None, at: Array | int = 0
  ) -> tuple[Array, Cache | None]:
    """Final-norm hidden states [B, L, D] and the written cache.

    `cache` and `at` are those of `run`.
    """
    return self.states_tapped(params, stream, Taps(), cache, at)[:2]

  def states_tapped(
    self,
    params: Params,
    stream: Stream,
    taps: Taps,
    cache: Cache | None = None,
    at: Array | int = 0,
  ) -> tuple[Array, Cache | None, Tapped]:
    """The outputs of `states`, and the inner states that `taps` selects; see `run_tapped`."""
    raw = dataclasses.replace(taps, normed=False)
    layers, stacks = {'decoder': self.layer}, {'decoder': params['layers']}
    streams, request = {'decoder': stream}, {'decoder': raw}
    hidden, cache, tapped = run_tapped(
      layers, stacks, streams, request, cache, at, self.remat, self.attention
    )
    norm = RMSNorm(self.config.body.eps)
    normed = lambda x: norm.apply({'params': params['norm']}, x)
    states = tapped['decoder']
    if taps.normed and taps.hidden:
      states = dataclasses.replace(states, hidden=normed(states.hidden))
    return normed(hidden['decoder']), cache, states


@dataclasses.dataclass(frozen=True)
class _Call:
  """Inputs that all layers of one `run` share."""

  layers: Mapping[str, Layer]
  tables: Mapping[str, tuple[Array, Array]]
  conditions: Mapping[str, Array | None]
  contexts: Mapping[str, tuple[Visibility, Visibility]]
  query: Visibility
  key: Visibility
  at: Array | int
  attention: str
  taps: Mapping[str, Taps]


def _tables(layer: Layer, stream: Stream) -> tuple[Array, Array]:
  if stream.rotation is not None:
    return stream.rotation
  c = layer.config
  return rope.rotary(stream.positions, c.head_width, c.rope_theta, c.rope_scaling)


def _dropout_keys(streams: Mapping[str, Stream]) -> dict[str, Array]:
  """Dropout keys [B] of the streams that have any."""
  return {n: s.dropout_keys for n, s in streams.items() if s.dropout_keys is not None}


def _of_layers(layer: Layer, keys: Array) -> Array:
  """Dropout keys [layers, B] of all layers, from the keys of the sequences [B]."""
  return jax.vmap(lambda key: jax.random.split(key, layer.config.layers), out_axes=1)(keys)


def _check_taps(
  layers: Mapping[str, Layer], streams: Mapping[str, Stream], taps: Mapping[str, Taps]
) -> None:
  if unknown := taps.keys() - streams.keys():
    raise ValueError(f'taps name {sorted(unknown)}: this call has streams of {sorted(streams)}')
  for name, request in taps.items():
    request.check(layers[name].config.layers)
    if request.normed:
      raise ValueError(f"taps of '{name}' are normed: layers have no final norm, set normed=False")


def _buffers(layer: Layer, taps: Taps, x: Array) -> Tapped:
  """Buffers for the inner states of tokens x [B, L, D]."""
  shape = (*x.shape[:2], layer.config.kv_heads, layer.config.head_width)
  return taps.buffers(x, jax.ShapeDtypeStruct(shape, layer.dtype))


def _unrolled(
  step: Callable[[_Carry, tuple[Any, ...]], tuple[_Carry, _KeysValues]],
  carry: _Carry,
  inputs: tuple[Any, ...],
) -> tuple[_Carry, _KeysValues]:
  """Replaces the `jax.lax.scan` of `run_tapped` for unstacked parameters and caches."""
  params, contexts, keys, cached, slots = inputs
  written = []
  for i in range(len(next(iter(params.values())))):
    weights = {name: stack[i] for name, stack in params.items()}
    context = {name: (k[i], v[i]) for name, (k, v) in contexts.items()}
    key = {name: layers[i] for name, layers in keys.items()}
    kv = None if cached is None else (cached[0][i], cached[1][i])
    slot = {name: tables.layer(i) for name, tables in slots.items()}
    carry, kv = step(carry, (weights, context, key, kv, slot))
    written.append(kv)
  if cached is None:
    return carry, None
  return carry, (tuple(k for k, _ in written), tuple(v for _, v in written))


def _layer(
  call: _Call,
  weights: Mapping[str, Params],
  contexts: Mapping[str, tuple[Array, Array]],
  keys: Mapping[str, Array],
  hidden: dict[str, Array],
  cached: _KeysValues,
) -> tuple[dict[str, Array], _KeysValues, dict[str, tuple[Array, Array]]]:
  """One layer (Eq. 4): projections per expert, one attention, output projection and MLP per expert.

  Experts with a context have cross-attention before the MLP. Returns hidden states, written keys
  and values of the cache, and the keys and values that taps select.
  """
  projected, modulation, tapped = {}, {}, {}
  for name in call.tables:  # In the order of the streams; the scan's carry is sorted by name.
    x = hidden[name]
    variables, condition = {'params': weights[name]}, call.conditions[name]
    layer = call.layers[name]
    modulation[name] = (
      None if condition is None else layer.apply(variables, condition, method='modulate')
    )
    q, k, v = layer.apply(variables, x, modulation[name], method='project')
    projected[name] = layer.rotate(q, call.tables[name]), layer.rotate(k, call.tables[name]), v
    if name in call.taps and call.taps[name].kv:
      tapped[name] = (projected[name][1] if call.taps[name].rotated else k), v
  q, k, v = (jnp.concatenate(parts, 1) for parts in zip(*projected.values(), strict=True))
  if cached is not None:
    cached = tuple(
      jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), call.at, 1)
      for old, new in zip(cached, (k, v), strict=True)
    )
    k, v = cached
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
      *(_cross_attention(call, name, contexts[name]) if name in contexts else ()),
      keys=keys.get(name),
      method='finish',
    )
    start = stop
  return out, cached, tapped


def _cross_attention(
  call: _Call, name: str, context: tuple[Array, Array]
) -> tuple[tuple[Array, Array], Callable[[Array], Array]]:
  """Arguments `tables` and `attend` of Layer.finish."""
  query, key = call.contexts[name]
  attend = lambda q: chooser.attention(q, *context, query, key, call.attention)
  return call.tables[name], attend
