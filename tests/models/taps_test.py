"""Hidden states of inner layers: equal to those of shorter stacks, no cost if not requested.

Equality with transformers: tests/checkpoints/families/decoders_test.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_systems import redrawn
from vpe_jax import sharding
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import UserError
from vpe_jax.models import mot, vit
from vpe_jax.models.decoder import Decoder, DecoderConfig
from vpe_jax.models.taps import Taps
from vpe_jax.models.transformer import Layer, TransformerConfig
from vpe_jax.ops import rope
from vpe_jax.ops.attention import chooser
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import causal_text

BODY = TransformerConfig(width=16, mlp=24, layers=4, heads=4, kv_heads=2, head_width=8)
IDS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 0, 0]])
LENGTH = jnp.array([6, 4])
TAPS = Taps(hidden=(4, 0, 3), kv=(3, 1))


def _decoder(**options):
  return Decoder(DecoderConfig(10, BODY, tied=True, context=6), **options)


@functools.cache
def _params():
  return redrawn(_decoder().init(jax.random.key(0)), 0.3)


def _first_layers(params, count):
  """The parameters of the first layers."""
  return params | {'layers': jax.tree.map(lambda leaf: leaf[:count], params['layers'])}


def _raw(params, count):
  """The residual stream after `count` layers, from a stack of only those."""
  text = build(causal_text(6), {'text': IDS}, {'text': LENGTH})['text']
  x = _decoder().embed(params, text.ids)
  if not count:
    return x
  stream = mot.Stream(x, text.positions, text.visibility)
  layers = Layer(dataclasses.replace(BODY, layers=count), jnp.float32)
  stack = _first_layers(params, count)['layers']
  return mot.run({'a': layers}, {'a': stack}, {'a': stream})[0]['a']


def _close(ours, theirs, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), ours, theirs
  )


def _plain(params, remat):
  """Final hidden states of a scan without taps and with one expert."""
  text = build(causal_text(6), {'text': IDS}, {'text': LENGTH})['text']
  x = _decoder().embed(params, text.ids)
  layer, query = Layer(BODY, jnp.float32), text.visibility
  query = jax.tree.map(lambda leaf: jnp.concatenate([leaf], 1), query)
  tables = rope.rotary(text.positions, BODY.head_width, BODY.rope_theta)

  def one(x, weights):
    q, k, v = layer.apply({'params': weights}, x, None, method='project')
    q, k, v = layer.rotate(q, tables), layer.rotate(k, tables), v
    q, k, v = (jnp.concatenate([part], 1) for part in (q, k, v))
    mixed = chooser.attention(q, k, v, query, query, '')
    x = layer.apply({'params': weights}, x, mixed[:, 0:6], None, keys=None, method='finish')
    return x, None

  if mot.REMAT[remat] is not None:
    one = jax.checkpoint(one, policy=mot.REMAT[remat])
  x, _ = jax.lax.scan(one, x, params['layers'])
  return mot.RMSNorm(BODY.eps).apply({'params': params['norm']}, x)


@pytest.mark.parametrize('remat', mot.REMAT)
def test_without_taps_the_program_is_a_plain_scan(remat):
  model, params = _decoder(remat=remat), _params()
  loss = lambda hidden: lambda params: jnp.sum(jnp.sin(hidden(params)))
  text = lambda hidden: str(jax.make_jaxpr(jax.grad(loss(hidden)))(params))
  plain = text(lambda params: _plain(params, remat))
  assert text(lambda params: model.hidden(params, IDS, LENGTH)) == plain
  no_taps = lambda params: model.hidden_tapped(params, IDS, LENGTH, Taps())[0]
  assert text(no_taps) == plain
  some = lambda params: model.hidden_tapped(params, IDS, LENGTH, TAPS)[0]
  assert text(some) != plain


@pytest.mark.parametrize('unstacked', [False, True])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_hidden_states_and_their_gradients_equal_those_of_shorter_stacks(unstacked, remat):
  model, params = _decoder(remat=remat), _params()

  def tapped(params, normed):
    params = model.prepare(params) if unstacked else params
    taps = dataclasses.replace(TAPS, normed=normed)
    return model.hidden_tapped(params, IDS, LENGTH, taps)[1].hidden

  raw = lambda params: jnp.stack([_raw(params, count) for count in TAPS.hidden])
  norm = mot.RMSNorm(BODY.eps)
  normed = lambda params: norm.apply({'params': params['norm']}, raw(params))
  run = jax.jit(tapped, static_argnums=1)
  _close(run(params, False), raw(params))
  _close(run(params, True), normed(params))
  weights = jnp.arange(1.0, 4.0)[:, None, None, None]
  loss = lambda hidden: jnp.sum(
    weights * jnp.sin(hidden) * (jnp.arange(6) < LENGTH[:, None])[..., None]
  )
  ours = jax.jit(jax.grad(lambda params: loss(tapped(params, False))))(params)
  _close(ours, jax.jit(jax.grad(lambda params: loss(raw(params))))(params), 1e-4)


@pytest.mark.parametrize('unstacked', [False, True])
def test_keys_and_values_of_several_experts_are_those_that_attention_reads(unstacked):
  """In a cached call, the slots of each expert; its own layer and norm sizes, and its own taps."""
  wide = dataclasses.replace(BODY, width=24, qk_norm=True)
  layers = {'b': Layer(BODY, jnp.float32), 'a': Layer(wide, jnp.float32)}
  key = jax.random.key(1)
  params = {name: redrawn(mot.init_layers(layer, key), 0.3) for name, layer in layers.items()}
  if unstacked:
    params = {name: mot.unstack(stack) for name, stack in params.items()}
  text = build(causal_text(9), {'text': jnp.zeros((2, 9))}, {'text': jnp.array([9, 8])})['text']

  def stream(name, start, stop):
    x = jax.random.normal(
      jax.random.fold_in(key, start), (2, stop - start, layers[name].config.width)
    )
    cut = lambda leaf: leaf[:, start:stop]
    return mot.Stream(x, cut(text.positions), jax.tree.map(cut, text.visibility))

  streams = {'b': stream('b', 2, 6), 'a': stream('a', 6, 9)}
  taps = {'a': Taps(hidden=(1,), kv=(2, 0)), 'b': Taps(kv=(1,))}

  @functools.partial(jax.jit, static_argnums=0)
  def run(rotated):
    cache = mot.empty_cache(layers['a'], params['a'], text.visibility, jnp.float32)
    _, cache = mot.run(layers, params, {'a': stream('a', 0, 2)}, cache, 0)
    of = {name: dataclasses.replace(request, rotated=rotated) for name, request in taps.items()}
    return mot.run_tapped(layers, params, streams, of, cache, 2)

  hidden, cache, tapped = run(True)
  # Values of up to 20, from two programs.
  _close(hidden, mot.run(layers, params, streams, cache, 2)[0], 1e-4)
  stacked = lambda numbers, leaves, *slots: jnp.stack(
    [leaves[i][:, slice(*slots)] for i in numbers]
  )
  for name, slots in (('b', (2, 6)), ('a', (6, 9))):
    _close(tapped[name].k, stacked(taps[name].kv, cache.k, *slots), 0)
    _close(tapped[name].v, stacked(taps[name].kv, cache.v, *slots), 0)
    before = run(False)[2][name]
    tables = rope.rotary(streams[name].positions, BODY.head_width, BODY.rope_theta)
    _close(jnp.stack([rope.rotate(k, tables) for k in before.k]), tapped[name].k)
    assert np.max(np.abs(before.k - tapped[name].k)) > 0.1
  assert tapped['b'].hidden is None and tapped['a'].hidden.shape == (1, 2, 3, 24)


def test_sharded_equals_unsharded():
  model, params = _decoder(), _params()
  ids = jax.random.randint(jax.random.key(2), (8, 6), 0, 10)
  run = lambda params, ids: model.hidden_tapped(params, ids, jnp.full(len(ids), 6), TAPS)
  unsharded = jax.jit(run)(params, ids)
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    _close(jax.jit(run)(params, sharding.put_batch(ids, mesh)), unsharded)


def test_memory_is_that_of_the_selected_layers():
  body = TransformerConfig(width=64, mlp=64, layers=24, heads=2, kv_heads=2, head_width=32)
  model = Decoder(DecoderConfig(10, body, tied=True, context=256))
  params = jax.eval_shape(model.init, jax.random.key(0))
  ids, length = jnp.zeros((4, 256), jnp.int32), jnp.full((4,), 256)

  def temporary(*hidden):
    """Peak bytes of a program that returns one number."""

    def total(params):
      states, tapped = model.hidden_tapped(params, ids, length, Taps(hidden=hidden))
      extra = jnp.sum(jnp.sin(tapped.hidden) * jnp.cos(tapped.hidden[:1])) if hidden else 0.0
      return jnp.sum(states) + extra

    return jax.jit(total).lower(params).compile().memory_analysis().temp_size_in_bytes

  state = 4 * 256 * 64 * 4
  none, two, every = temporary(), temporary(7, 16), temporary(*range(1, 25))
  assert two - none < 4 * state
  assert every - none > 20 * state


@pytest.mark.parametrize('sharded', [False, True])
def test_hidden_states_of_an_encoder_equal_its_output_at_that_depth(sharded):
  config = vit.EncoderConfig(width=32, layers=5, heads=2, mlp=48)
  encoder = vit.Encoder(config, jnp.float32)
  x = jax.random.normal(jax.random.key(0), (8, 12, 32))
  variables = redrawn(encoder.init(jax.random.key(1), x), 0.2)
  call = lambda taps: jax.jit(lambda v, x: encoder.apply(v, x, taps, method='tapped'))
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh) if sharded else contextlib.nullcontext():
    states = call(Taps(hidden=(4, 0, 2)))(variables, x)
    last = call(Taps(hidden=(5,), normed=True))(variables, x)
  for depth, state in zip((4, 0, 2), states, strict=True):
    _close(state, encoder.apply(variables, x, depth=depth))
  _close(last[0], encoder.apply(variables, x))
  flops = lambda *hidden: call(Taps(hidden)).lower(variables, x).cost_analysis()['flops']
  assert flops(2) < 0.5 * flops(5)  # layers after the last tap don't run
  with pytest.raises(UserError, match='taps.kv'):
    call(Taps(hidden=(1,), kv=(1,)))(variables, x)


@pytest.mark.parametrize(
  'taps, field',
  [
    (lambda: Taps(hidden=(5,)), 'taps.hidden'),
    (lambda: Taps(hidden=(-1,)), 'taps.hidden'),
    (lambda: Taps(kv=(4,)), 'taps.kv'),
    (lambda: Taps(kv=(1, 1)), 'taps.kv'),
  ],
)
def test_layers_that_are_missing_or_named_twice_are_refused(taps, field):
  with pytest.raises(UserError, match=field):
    _decoder().hidden_tapped(_params(), IDS, LENGTH, taps())


def test_taps_that_a_stack_cannot_serve_are_refused():
  layers, stacks = {'a': Layer(BODY, jnp.float32)}, {'a': _params()['layers']}
  text = build(causal_text(6), {'text': IDS}, {'text': LENGTH})['text']
  streams = {'a': mot.Stream(_raw(_params(), 0), text.positions, text.visibility)}
  with pytest.raises(ValueError, match="'b'"):
    mot.run_tapped(layers, stacks, streams, {'b': Taps(hidden=(1,))})
  with pytest.raises(ValueError, match="'a'.*norm"):
    mot.run_tapped(layers, stacks, streams, {'a': Taps(hidden=(1,), normed=True)})
