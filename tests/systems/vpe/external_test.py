"""External+VPE: parameters, the two sequences, trained groups, and cached sampling."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import t2i as config_file
from tests.small_systems import assert_close, encoded_examples, flow_step, host_params, request_of
from vpe_jax import rng, systems
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import Batch, UserError, Visibility
from vpe_jax.evaluation import heldout
from vpe_jax.models import mot, unified
from vpe_jax.models.transformer import Layer
from vpe_jax.ops import rope
from vpe_jax.ops.attention import reference
from vpe_jax.ops.flops import matrix_flops
from vpe_jax.sampling import flow
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import cross_attention
from vpe_jax.sharding import leaves_by_path, make_mesh, param_shardings
from vpe_jax.systems.vpe.text_to_image import Sampling
from vpe_jax.training.state import first_state

KEY = rng.run_key(0)
B = 4
ALL = jnp.ones(B, bool)
KEEP = jnp.array([True, True, False, True])
CLOCK = jnp.array([0.3, 0.5, 0.7, 0.9])


def _system(arch='external', preset='debug', stages=None, **model):
  config = config_file.get_config(f'{preset},arch={arch}')
  config.data.source = 'synthetic'
  config.model.update(model)
  if preset == 'debug':
    config.data.text_length = 5
    config.model.dual_path.encoder.layers = config.model.head.layers = 1
  values = config.to_dict()
  values |= {'stages': stages or values['stages'], 'steps': 4, 'batch_size': 8}
  return systems.build(values)


def _batch(system) -> Batch:
  return encoded_examples(system, B)


def _regions(system, batch, codes, keep):
  """Regions of a batch; where `keep` [B] is False, the image has no visual prompt."""
  return system.experts.regions(batch, codes, {'prompt': jnp.ones(B, bool), 'visual_prompt': keep})


@functools.cache
def _cached_system(condition: str):
  return _system(condition=condition)


@functools.cache
def _uncached(condition: str):
  """Compiled and uncached: hidden states of the AR expert, and the velocity."""

  def run(params, codes, keep, latents, clock):
    system = _cached_system(condition)
    regions = _regions(system, _batch(system), codes, keep)
    return system.experts.forward(params, regions, (latents, clock), None)

  return jax.jit(run)


@functools.cache
def _params(condition: str):
  return host_params(_cached_system(condition))


@pytest.fixture(scope='module')
def params():
  """Parameters of all architectures but External+VPE with cross-attention."""
  return _params('prefix')


@pytest.mark.parametrize('preset', ['debug', 'tiny', 'paper', 'pod'])
def test_parameters_equal_those_of_internal(preset):
  ours, theirs = (
    {path: leaf.shape for path, leaf in leaves_by_path(jax.eval_shape(system.init, KEY)).items()}
    for system in (_system(preset=preset), _system('internal', preset))
  )
  assert ours == theirs
  total = sum(np.prod(shape) for shape in ours.values())
  assert preset in ('debug', 'tiny') or abs(total - 4_166.3e6) < 0.2e6


@pytest.mark.parametrize('preset', ['debug', 'paper'])
def test_cross_attention_adds_parameters(preset):
  """Each layer of the diffusion expert has them, and each has a sharding."""
  system = _system(preset=preset, condition='cross')
  with_cross, without_cross = (
    leaves_by_path(jax.eval_shape(made.init, KEY)) for made in (system, _system(preset=preset))
  )
  added = {path: leaf for path, leaf in with_cross.items() if path not in without_cross}
  assert all(path.startswith('dit/layers/cross/') for path in added)
  assert {path: leaf.shape for path, leaf in with_cross.items() if path not in added} == {
    path: leaf.shape for path, leaf in without_cross.items()
  }
  c = system.config.model.dit
  heads, kv, D = c.heads * c.head_width, c.kv_heads * c.head_width, c.width
  per_layer = D * (heads + 2 * kv) + heads + 2 * kv + heads * D + 2 * D
  assert sum(leaf.size for leaf in added.values()) == c.layers * per_layer
  total = sum(leaf.size for leaf in with_cross.values())
  assert preset == 'debug' or abs(total - 4_320.6e6) < 0.2e6
  mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2, strategy='fsdp_tensor'))
  shardings = param_shardings(added, system.logical_axes, mesh, 'fsdp_tensor')
  specs = {path.split('cross/')[1]: sharding.spec for path, sharding in shardings.items()}
  assert specs['q/kernel'][1:] == ('fsdp', 'tensor') if preset == 'paper' else len(specs) == 9


def test_stage_plan_equals_that_of_internal(params):
  """One checkpoint serves both: the losses are the same function of the same parameters."""
  losses = []
  for system in (_system('internal'), _cached_system('prefix')):
    stage, batch = system.stages[0], _batch(system)
    assert stage.trainable == ('ar/', 'embed/') and stage.losses == {'next_token': 1.0}
    loss = lambda p, system=system, batch=batch: system.losses(
      p, {}, batch, KEY, 0, system.stages[0]
    )
    losses.append(jax.jit(loss)(params))
  ours, theirs = ({name: (t.sum, t.count) for name, t in terms.items()} for terms in losses)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize('condition', unified.CONDITIONS)
def test_stage_render_trains_the_diffusion_expert_on_the_flow_alone(condition):
  """Checks the optimizer state, gradients, and the terms that evaluation adds at weight 0."""
  system = _cached_system(condition)
  stage, batch = system.stages[1], _batch(system)
  assert stage.losses == {'flow': 1.0}
  assert set(jax.eval_shape(lambda: system.counts(batch, KEY, 0, system.stages[1]))) == {'flow'}
  shapes = jax.eval_shape(system.init, KEY)
  state = jax.eval_shape(lambda p: first_state(p, stage), shapes)
  for tree in (state['ema'], state['opt_state']['mu'], state['opt_state']['nu']):
    assert {path.split('/')[0] for path in leaves_by_path(tree)} == {'dit'}
  # As held-out evaluation runs it.
  stage = heldout.with_all_losses(system.stages, 1)
  losses = lambda p: system.losses(p, {}, batch, KEY, 0, stage)
  weights = {}
  jax.eval_shape(lambda p: weights.update({n: t.weight for n, t in losses(p).items()}), shapes)
  assert weights == {'next_token': 0.0, 'accuracy': 0.0, 'flow': 1.0}
  counts = jax.jit(lambda: system.counts(batch, KEY, 0, stage))()
  assert float(counts['next_token']) == B * (system.config.model.visual_prompt_tokens + 1)
  # The gradient of frozen parameters is 0 by construction: no matrix product computes it.
  gradient = jax.grad(lambda p: losses(p)['flow'].sum)
  assert matrix_flops(lambda p: [gradient(p)[name] for name in ('ar', 'embed')], shapes) == 0


def test_the_visual_prompt_alone_is_dropped_at_the_configured_rate():
  system = _cached_system('prefix')
  batch, codes = _batch(system), system.config.model.visual_prompt_tokens
  many = dataclasses.replace(batch, example=jnp.arange(4096))
  assert (
    abs(np.mean(system.dropping.keep(many, KEY, system.stages[1])['visual_prompt']) - 0.9) < 0.02
  )
  regions = jax.jit(lambda: _regions(system, batch, batch.encoded['visual_prompt'], KEEP))()
  present = {name: np.asarray(region.visibility.until) > 0 for name, region in regions.items()}
  assert (present['prefix'][:, :codes] == np.asarray(KEEP)[:, None]).all()
  assert present['prefix'][:, codes].all() and present['dit'].all()
  length = np.asarray(batch.inputs['text_length'])
  np.testing.assert_array_equal(present['ar'].sum(1), 3 + codes + length)
  assert regions['prefix'].positions[2, codes] == 0 and regions['dit'].positions[2, 0] == 1


@pytest.mark.parametrize(
  'condition, prepared, guidance',
  [('prefix', False, 1), ('keys', True, 2), ('cross', True, 1), ('cross', False, 1)],
)
def test_decoding_and_cached_flow_steps_equal_whole_sequences(condition, prepared, guidance):
  """With the decoded visual prompt, and without one: the unconditional branch of guidance."""
  system, params = _cached_system(condition), _params(condition)
  batch, settings = _batch(system), Sampling(plan_guidance=float(guidance))
  request = request_of(batch)

  @jax.jit
  def cached(weights):
    experts = system.experts
    codes, decoded = experts.ar.decode(weights, request, KEY, settings)
    conditional = experts.prefix(weights, request, codes, decoded)
    prefixes = conditional, experts.null_prefix(weights, request)
    flows = [
      flow_step(system, weights, prefix, batch.encoded['latents'], CLOCK) for prefix in prefixes
    ]
    return codes, decoded.state, flows

  codes, states, (conditional, unconditional) = cached(
    system.prepare(params, 'cpu') if prepared else params
  )
  uncached = lambda codes, keep, latents=batch.encoded['latents']: _uncached(condition)(
    params, codes, keep, latents, CLOCK
  )
  hidden, expected = uncached(codes, ALL)
  first, last = system.experts.networks.codes
  assert_close(states[:, first:last], hidden[:, first:last])
  assert_close(conditional, expected)
  hidden_dropped, expected_dropped = uncached(codes, ~ALL)
  assert_close(unconditional, expected_dropped)
  assert float(jnp.abs(conditional - unconditional).max()) > 1e-2
  # The image attends to the visual prompt, and not the other way around.
  assert float(jnp.abs(uncached(codes[:, ::-1], ALL)[1] - expected).max()) > 1e-2
  np.testing.assert_array_equal(hidden_dropped, hidden)
  np.testing.assert_array_equal(uncached(codes, ALL, -batch.encoded['latents'])[0], hidden)


@pytest.mark.parametrize('condition', ['keys', 'cross'])
def test_rendering_of_fixed_codes_follows_the_uncached_velocity(condition):
  """Guided, from the noise of each example; the order of the batch doesn't matter."""
  system, params = _cached_system(condition), _params(condition)
  batch, scale = _batch(system), 2.0
  settings = Sampling(steps=2, guidance=scale)
  run = jax.jit(lambda request: system.sample(params, request, KEY, settings))
  codes, latents = run(request_of(batch, 'visual_prompt'))
  np.testing.assert_array_equal(codes, batch.encoded['visual_prompt'])

  def velocity(x, time):
    clock = jnp.full((B,), 1.0 - time)
    conditional, unconditional = (
      _uncached(condition)(params, codes, keep, x, clock)[1] for keep in (ALL, ~ALL)
    )
    return -(unconditional + scale * (conditional - unconditional))

  noise = lambda key: jax.random.normal(key, batch.encoded['latents'].shape[1:])
  x = rng.per_example(noise, KEY, 'noise', batch.example)
  times = flow.time_grid(settings.steps, settings.shift)
  for time, later in zip(times[:-1], times[1:], strict=True):
    x = x + (later - time) * velocity(x, time)
  assert_close(latents, x)
  reversed_request = jax.tree.map(lambda leaf: leaf[::-1], request_of(batch, 'visual_prompt'))
  assert_close(run(reversed_request)[1][::-1], latents)


def _eq_4(system, params, batch):
  """Both experts in one sequence, where image tokens see only the codes of the AR expert."""
  model, (first, last) = system.model, system.experts.networks.codes
  regions = _regions(system, batch, batch.encoded['visual_prompt'], KEEP)
  ar, prefix, dit = (regions[name] for name in ('ar', 'prefix', 'dit'))
  index, count = jnp.arange(ar.ids.shape[1]), last - first
  is_seen = (index >= first) & (index < last) & KEEP[:, None]
  end = ar.visibility.reach.max(1, keepdims=True)
  until = jnp.where(is_seen, ar.visibility.until, jnp.minimum(ar.visibility.until, end))
  tokens = dataclasses.replace(
    model.token_stream(params, ar), visibility=dataclasses.replace(ar.visibility, until=until)
  )
  shift = end - count * KEEP[:, None]
  shifted = lambda seen: Visibility(seen.order + shift, seen.since, seen.reach + shift, seen.until)
  start = ar.positions[:, first : first + 1]
  image, condition = model.image_stream(params, batch.encoded['latents'], CLOCK, dit)
  boi = jax.tree.map(lambda leaf: leaf[:, count:], prefix)
  image_stream = mot.Stream(
    jnp.concatenate([model.embed(params, boi.ids), image.x], 1),
    jnp.concatenate([boi.positions, dit.positions], 1) + start,
    jax.tree.map(
      lambda *leaves: jnp.concatenate(leaves, 1), shifted(boi.visibility), shifted(dit.visibility)
    ),
  )
  hidden, _ = model.backbone(params, {'ar': tokens, 'dit': image_stream})
  states = jnp.concatenate([hidden['ar'][:, first:last], hidden['dit'][:, :1]], 1)
  streams = {
    'prefix': mot.Stream(states, prefix.positions, prefix.visibility),
    'dit': mot.Stream(hidden['dit'][:, 1:], dit.positions, dit.visibility, condition),
  }
  return model.velocity(params, model.head(params, streams)[0]['dit'], condition)


def test_condition_keys_is_eq_4_restricted_to_the_codes(params):
  system = _cached_system('keys')
  batch = _batch(system)
  codes, latents = batch.encoded['visual_prompt'], batch.encoded['latents']
  velocity = _uncached('keys')(params, codes, KEEP, latents, CLOCK)[1]
  assert_close(velocity, jax.jit(lambda p: _eq_4(system, p, batch))(params), 1e-5)


def _without_cross(params):
  layers = {name: leaf for name, leaf in params['dit']['layers'].items() if name != 'cross'}
  return params | {'dit': params['dit'] | {'layers': layers}}


def test_a_fresh_cross_attention_and_a_dropped_visual_prompt_change_nothing():
  """Both equal condition `prefix` without its visual prompt: the sequence `[boi] | time x`."""
  system, params = _cached_system('cross'), _params('cross')
  batch, layers = _batch(system), params['dit']['layers']
  cross = jax.jit(lambda: system.init(KEY)['dit']['layers']['cross'])()
  fresh_cross = params | {'dit': params['dit'] | {'layers': layers | {'cross': cross}}}
  codes, latents = batch.encoded['visual_prompt'], batch.encoded['latents']
  kept, dropped = (codes, ALL, latents, CLOCK), (codes, ~ALL, latents, CLOCK)
  expected = _uncached('prefix')(_without_cross(params), *dropped)[1]
  assert_close(_uncached('cross')(fresh_cross, *kept)[1], expected, 1e-5)
  assert_close(_uncached('cross')(params, *dropped)[1], expected, 1e-5)
  assert float(jnp.abs(_uncached('cross')(params, *kept)[1] - expected).max()) > 1e-2


def test_cross_attention_comes_between_self_attention_and_mlp():
  """reference: numpy, head by head: rotated products, a softmax over the codes present."""
  c = _cached_system('cross').config.model.dit
  layer = Layer(c, jnp.float32, crossed=True)
  weights = jax.tree.map(lambda leaf: leaf[0], _params('cross')['dit']['layers'])
  run = lambda *args, **kwargs: layer.apply({'params': weights}, *args, **kwargs)
  numpy_rng = np.random.default_rng(2)
  normal = lambda *shape: jnp.asarray(numpy_rng.standard_normal(shape), jnp.float32)
  x, attended, context = (
    normal(1, 3, c.width),
    normal(1, 3, c.heads, c.head_width),
    normal(1, 5, c.width),
  )
  positions = lambda first, count: jnp.arange(first, first + count)[None]
  tables = lambda *span: rope.rotary(positions(*span), c.head_width, c.rope_theta)
  k, v = run(context, tables(0, 5), method='context_kv')
  sides = build(cross_attention(queries=3, keys=5), lengths={'keys': jnp.array([4])})
  visibilities = [sides[side].visibility for side in ('queries', 'keys')]
  attend = lambda q: reference.attention(q, k, v, *visibilities)[0]
  outputs = run(x, attended, None, tables(5, 3), attend, method='finish')

  cross = weights['cross']
  norm = lambda y, name: (
    y * cross[name]['scale'] / np.sqrt(np.mean(y**2, -1, keepdims=True) + c.eps)
  )
  heads = lambda y, name: np.einsum('BLD,DNH->BLNH', y, cross[name]['kernel']) + cross[name]['bias']
  residual = np.asarray(x + np.einsum('BLNH,NHD->BLD', attended, weights['o']['kernel']))
  q = rope.rotate(heads(norm(residual, 'query_norm'), 'q'), tables(5, 3))
  y = norm(np.asarray(context), 'context_norm')
  k, v = rope.rotate(heads(y, 'k'), tables(0, 5)), heads(y, 'v')
  for n in range(c.heads):
    logits = q[0, :, n] @ k[0, :4, n * c.kv_heads // c.heads].T / np.sqrt(c.head_width)
    attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    values = attention @ v[0, :4, n * c.kv_heads // c.heads]
    residual = residual + values @ cross['o']['kernel'][n]
  # The rest of the layer: the MLP.
  expected = run(residual, jnp.zeros_like(attended), method='finish')
  np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'arch, stages, model, message',
  [
    ('external', ('plan', 'joint'), {}, "arch=external .*has no stage 'joint', but plan, render"),
    ('internal', ('plan', 'render'), {}, "arch=internal .*has no stage 'render', but plan, joint"),
    ('external', ('plan', 'rendr'), {}, "no stage 'rendr'.*'render'"),
    ('external', ('render',), {}, 'config.start=RUN'),
    ('external', None, {'condition': 'keyz'}, 'prefix, keys, cross'),
    ('external', None, {'ar': {'width': 64, 'head_width': 16}}, 'model.dit.width must be equal'),
  ],
)
def test_errors_name_the_field(arch, stages, model, message):
  with pytest.raises(UserError, match=message) as error:
    _system(arch, stages=stages, **model)
  assert '\n' not in str(error.value)
