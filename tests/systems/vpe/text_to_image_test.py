"""Internal+VPE: the module tree of all presets, losses, freezing, and cached sampling."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import t2i as config_file
from tests.small_pipelines import small_pipeline
from tests.small_systems import (
  assert_close,
  encoded_examples,
  flow_step,
  host_params,
  redrawn,
  request_of,
  with_encoded,
  with_inputs,
)
from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import MeshConfig, to_dict
from vpe_jax.contracts import Batch, UserError
from vpe_jax.models import mot
from vpe_jax.sampling import flow
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.systems.vpe.text_to_image import Sampling
from vpe_jax.training import resume

KEY = rng.run_key(0)


def _system(arg: str = 'debug', **model):
  config = config_file.get_config(arg)
  config.data.source = 'synthetic'
  config.model.update(model)
  return systems.build(config.to_dict())


@pytest.fixture(scope='module')
def system():
  return _system()


@pytest.fixture(scope='module')
def params(system):
  """Fresh parameters with noise on each, so that no zero-initialized map is the identity."""
  return redrawn(jax.jit(system.init)(KEY), 0.1)


def _batch(system, B: int = 4) -> Batch:
  return encoded_examples(system, B)


def _total(system, stage, batch):
  """The stage's weighted loss, as a function of the parameters."""

  def total(params):
    terms = system.losses(params, {}, batch, KEY, 0, stage)
    return sum(term.weight * term.sum / term.count for term in terms.values())

  return total


def _gradient(system, stage, batch):
  """Compiled: the loss of a stage and its gradient, as a function of the parameters."""
  return jax.jit(jax.value_and_grad(_total(system, stage, batch)))


@pytest.fixture(scope='module')
def expected_gradient(system, params):
  """A function from a stage's index to its loss and gradient for a batch of 16, computed once."""
  batch = _batch(system, 16)
  return functools.cache(lambda index: _gradient(system, system.stages[index], batch)(params))


def _assert_near(gradient, expected):
  """Compares trees; the tolerance is relative to the largest value of the expected one."""
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
  assert_near = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale)
  jax.tree.map(assert_near, gradient, expected)


def _paths(tree) -> set[str]:
  return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _abstract(arg: str):
  return jax.eval_shape(_system(arg).init, KEY)


def test_presets_build_one_module_tree():
  trees = [_paths(_abstract(arg)) for arg in ('debug', 'tiny', 'paper', 'pod')]
  assert all(tree == trees[0] for tree in trees)


def test_parameter_count_is_the_papers():
  """reference: two Qwen2.5-1.5B bodies, one text table, one dual path, one head: 4,166.3M."""
  total = sum(leaf.size for leaf in jax.tree.leaves(_abstract('paper')))
  assert abs(total - 4_166.3e6) < 0.2e6


def test_single_arch_has_one_body():
  tree = _abstract('debug,arch=single')
  assert set(tree['dit']) == {'dual_path', 'head'}
  assert _paths(tree['ar']) == _paths(_abstract('debug')['ar'])


@pytest.mark.parametrize('arg', ['debug', 'debug,arch=single'])
def test_losses_and_counts(arg):
  system = _system(arg)
  params, batch = jax.jit(system.init)(KEY), _batch(system)
  for stage in system.stages:
    terms = jax.jit(lambda p, b, s=stage: system.losses(p, {}, b, KEY, 0, s))(params, batch)
    counts = system.counts(batch, KEY, 0, stage)
    assert {name: float(t.count) for name, t in terms.items()} == {
      name: float(count) for name, count in counts.items()
    }
    # A fresh model is close to uniform over the joint vocabulary and predicts velocity 0.
    nats = float(terms['next_token'].sum / terms['next_token'].count)
    assert abs(nats - np.log(1024 + 512 + 2)) < 0.1
    if 'flow' in terms:
      assert 1.5 < float(terms['flow'].sum / terms['flow'].count) < 2.5


def test_stage_plan_neither_reads_nor_trains_the_diffusion_expert(system, params):
  batch, stage = _batch(system), system.stages[0]

  def total(p):
    term = system.losses(p, {}, batch, KEY, 0, stage)['next_token']
    return term.sum / term.count

  gradient = jax.jit(jax.grad(total))(params)
  assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradient['dit']))
  assert float(jnp.abs(gradient['ar']['layers']['q']['kernel']).max()) > 0


def test_cross_entropy_is_independent_of_noise_and_flow_loss_reaches_the_ar_expert(system, params):
  """The prefix attends to no image: its loss is the same at any noise. The flow loss trains it."""
  batch = _batch(system)
  joint = system.stages[1]
  loss = jax.jit(lambda key: system.losses(params, {}, batch, key, 0, joint)['next_token'].sum)
  keep = np.asarray(system.dropping.keep(batch, KEY, joint)['prompt'])
  keys = map(rng.run_key, range(1, 50))
  same_drops = next(
    key for key in keys if (system.dropping.keep(batch, key, joint)['prompt'] == keep).all()
  )
  np.testing.assert_allclose(loss(KEY), loss(same_drops), rtol=1e-6)
  flow = lambda p: system.losses(p, {}, batch, KEY, 0, joint)['flow'].sum
  gradient = jax.jit(jax.grad(flow))(params)
  assert float(jnp.abs(gradient['ar']['layers']['v']['kernel']).max()) > 0


def _settings(**settings):
  return Sampling(steps=3, **settings)


@pytest.mark.parametrize('prepared', [False, True])
def test_cached_flow_step_equals_whole_sequence(system, params, prepared):
  batch = _batch(system)
  codes, latents = batch.encoded['visual_prompt'], batch.encoded['latents']
  regions = system.experts.regions(batch, codes, jnp.ones(4, bool))
  time = jnp.full((4,), 0.3)
  _, whole = jax.jit(system.model)(params, regions, latents, time)
  weights = system.prepare(params, 'cpu') if prepared else params

  @jax.jit
  def cached(weights):
    _, prefix = system.experts.prefix(weights, batch, KEY, _settings())
    return flow_step(system, weights, prefix, latents, time)

  assert_close(cached(weights), whole, 1e-5)


def test_greedy_decoding_equals_whole_sequence(system, params):
  """Each code is the argmax of the uncached model given the codes before it."""
  batch, settings = _batch(system), _settings(temperature=0.0)
  request = request_of(batch)
  write = jax.jit(lambda p: system.experts.prefix(p, request, KEY, settings))
  codes, prefix = write(params)
  regions = system.experts.regions(batch, codes, jnp.ones(4, bool))
  stream = system.model.token_stream(params, regions['ar'])
  hidden = jax.jit(system.model.backbone)(params, {'ar': stream})[0]['ar']
  first = system.experts.ar.slot('bot')
  logits = system.model.code_logits(params, hidden[:, first : first + codes.shape[1]])
  chosen = jnp.take_along_axis(logits, codes[..., None], -1)[..., 0]
  np.testing.assert_allclose(chosen, logits.max(-1), rtol=1e-5, atol=1e-5)
  # The caches hold the whole prefix, visual prompt included.
  with_codes = with_encoded(request, visual_prompt=codes)
  _, expected = jax.jit(lambda p: system.experts.prefix(p, with_codes, KEY, settings))(params)
  for a, b in zip(jax.tree.leaves(prefix), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_guided_codes_extrapolate_from_the_unconditional_logits(system, params):
  """Each code is the argmax of the uncached logits, guided away from those without text."""
  batch, scale = _batch(system), 2.5
  settings = _settings(temperature=0.0, plan_guidance=scale)
  request = request_of(batch)
  write = jax.jit(lambda p: system.experts.prefix(p, request, KEY, settings))
  codes, prefix = write(params)
  first = system.experts.ar.slot('bot')

  def logits(text_length):
    prompts = with_inputs(batch, text_length=text_length)
    regions = system.experts.regions(prompts, codes, jnp.ones(4, bool))
    stream = system.model.token_stream(params, regions['ar'])
    hidden = jax.jit(system.model.backbone)(params, {'ar': stream})[0]['ar']
    return system.model.code_logits(params, hidden[:, first : first + codes.shape[1]])

  conditional, unconditional = logits(batch.inputs['text_length']), logits(jnp.zeros(4, jnp.int32))
  guided = unconditional + scale * (conditional - unconditional)
  chosen = jnp.take_along_axis(guided, codes[..., None], -1)[..., 0]
  np.testing.assert_allclose(chosen, guided.max(-1), rtol=1e-4, atol=1e-4)
  assert (jnp.argmax(conditional, -1) != codes).any()
  # The image is rendered from the conditional branch alone.
  with_codes = with_encoded(request, visual_prompt=codes)
  _, expected = jax.jit(lambda p: system.experts.prefix(p, with_codes, KEY, settings))(params)
  for a, b in zip(jax.tree.leaves(prefix), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('prepared', [False, True])
def test_null_prefix_equals_a_dropped_sequence(system, params, prepared):
  """The two-token null prefix renders the same as a full sequence with every condition dropped."""
  batch, settings = _batch(system), _settings(guidance=0.0)
  latents = batch.encoded['latents']
  weights = system.prepare(params, 'cpu') if prepared else params

  @jax.jit
  def null(weights):
    prefix = lambda dropped: system.experts.null_prefix(weights, batch)
    guidance = Guidance.classifier_free(0.0, system.experts.conditions)
    return system.experts.renderer.render(weights, latents, settings, guidance, prefix)

  regions = system.experts.regions(batch, batch.encoded['visual_prompt'], jnp.zeros(4, bool))

  @jax.jit
  def dropped(params):
    def velocity(x, time, step):
      return -system.model(params, regions, x, jnp.full((4,), 1.0 - time))[1]

    return flow.integrate(velocity, latents, flow.time_grid(3, settings.shift))

  np.testing.assert_allclose(null(weights), dropped(params), rtol=1e-4, atol=1e-4)


def test_guidance_one_is_conditional_and_zero_is_null(system, params):
  batch = _batch(system)

  def sample(scale: float):
    settings = _settings(guidance=scale)
    return jax.jit(lambda p: system.sample(p, batch, KEY, settings))(params)[1]

  conditional, unconditional, guided = sample(1.0), sample(0.0), sample(2.0)
  assert float(jnp.abs(conditional - unconditional).max()) > 1e-3
  both_branches = sample(1.0 + 1e-6)
  np.testing.assert_allclose(both_branches, conditional, rtol=1e-3, atol=1e-4)
  assert float(jnp.abs(guided - conditional).max()) > 1e-3


def test_samples_do_not_depend_on_their_batch(system, params):
  batch, settings = _batch(system), _settings(guidance=2.0)
  request = request_of(batch)
  run = jax.jit(lambda r: system.sample(params, r, KEY, settings))
  codes, latents = run(request)
  reversed_request = jax.tree.map(lambda leaf: leaf[::-1], request)
  reversed_codes, reversed_latents = run(reversed_request)
  np.testing.assert_array_equal(codes, reversed_codes[::-1])
  np.testing.assert_allclose(latents, reversed_latents[::-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('remat', sorted(mot.REMAT.keys() - {'none'}))
def test_remat_changes_no_gradient(system, params, expected_gradient, monkeypatch, remat):
  _, expected = expected_gradient(1)
  monkeypatch.setattr(system, 'model', dataclasses.replace(system.model, remat=remat))
  _, gradient = _gradient(system, system.stages[1], _batch(system, 16))(params)
  _assert_near(gradient, expected)


def _gram(vectors):
  vectors = np.asarray(vectors, np.float64)
  vectors = vectors - vectors.mean(0)
  return vectors @ vectors.T / np.sum(vectors**2)


def test_inherited_embeddings_keep_the_distances_of_the_codecs():
  config = config_file.get_config('tiny')
  config.model.inherit = 0.05
  system = systems.build(config.to_dict())
  frozen = {name: weights.load(network.source)[0] for name, network in system.frozen.items()}
  random = jax.jit(system.init)(KEY)
  inherited = jax.jit(system.inherit)(random, frozen, KEY)
  codebook = np.asarray(frozen['feature_vq']['codebook'], np.float32)
  codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
  text, codes = inherited['embed']['text'], inherited['embed']['codes']
  np.testing.assert_allclose(_gram(codes[: system.codes]), _gram(codebook), atol=1e-7)
  token_table = np.asarray(frozen['siglip']['text']['token'], np.float32)
  np.testing.assert_allclose(_gram(text), _gram(token_table), atol=1e-7)
  assert abs(float(jnp.std(text)) - 0.05) < 1e-3
  np.testing.assert_array_equal(codes[system.codes :], random['embed']['codes'][system.codes :])
  _assert_equal({**inherited, 'embed': random['embed']}, random)
  assert system.initialization.from_frozen == (('embed/', 'the codecs'),)


def test_nothing_is_inherited_from_synthetic_codes_or_by_default(system):
  params = {'embed': {}}
  for other in (system, _system('tiny')):
    assert other.inherit(params, {}, KEY) is params and not other.initialization.from_frozen


def _assert_equal(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_cross_entropy_weight_follows_equation_3(system):
  """reference: Eq. 3 at s/S = 0, 1/2 and 1."""
  plan, joint = system.stages
  weight = lambda step: float(joint.weight('next_token', step))
  total = system.config.steps[1]
  assert [round(weight(s), 5) for s in (0, total / 2, total)] == [0.03047, 0.065, 0.09953]
  assert plan.weight('next_token', 0) == joint.weight('flow', 0) == 1.0


@pytest.mark.parametrize(
  'schedule, expected',
  [('linear', [0.03, 0.065, 0.1]), ('constant', [0.03] * 3), ('off', [1.0] * 3)],
)
def test_other_schedules_of_the_cross_entropy_weight(schedule, expected):
  system = _system(vp_schedule=schedule)
  total = system.config.steps[1]
  joint = system.stages[1]
  weights = [float(joint.weight('next_token', s)) for s in (0, total / 2, total)]
  np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'codes': 100}, 'codes'),
    ({'arch': 'doubel'}, 'arch'),
    ({'layout': 'x'}, 'layout'),
    ({'image': {'channels': 3}}, 'latent_channels'),
    ({'inherit': 0.02, 'text_vocab': 2048}, 'model.inherit=0'),
    ({'inherit': 0.02, 'vpe': False}, 'model.vpe=False leaves it out: set model.inherit=0'),
    ({'arch': 'external', 'vpe': False}, 'arch=external renders from the visual prompt alone'),
    ({'vpe': False}, "stage 'plan' learns to write visual prompts, but model.vpe=False"),
    ({'vp_schedule': 'cosine'}, "'model.vp_schedule' is 'cosine': it must be one of sigmoid"),
    ({'patch': 3}, "'model.patch' is 3: it must be a divisor of latent_size=16"),
    ({'flow': {'shift': -1.0}}, "'model.flow.shift' is -1.0: it must be above 0 and finite"),
    ({'flow': {'shift_by': 'size'}}, "'model.flow.shift_by' is 'size': it must be one of constant"),
    ({'ce_start': -0.1}, "'model.ce_start' is -0.1: it must be at least 0"),
    ({'ar': {'rope_theta': 0.0}}, "rope_theta' is 0.0: it must be above 0"),
  ],
)
def test_errors_name_the_field(change, message):
  with pytest.raises(UserError, match=message):
    _system(**change)


def test_settings_of_other_systems_are_unknown():
  config = config_file.get_config('debug')
  config.sample.image_guidance = 2.0
  with pytest.raises(UserError, match="'sample.image_guidance'; did you mean '"):
    systems.build(config.to_dict())


def test_unknown_stage_names_the_nearest():
  config = config_file.get_config('debug')
  config.stages = ('plann',)
  config.steps, config.batch_size = (1,), (8,)
  with pytest.raises(UserError, match="'plan'"):
    systems.build(config.to_dict())


def test_unrolled_layers_train_as_scanned_ones(system, params, expected_gradient):
  unrolled = systems.build({**to_dict(system.config), 'unroll': True})
  for index, stage in enumerate(unrolled.stages):
    loss, gradient = _gradient(unrolled, stage, _batch(system, 16))(params)
    np.testing.assert_allclose(loss, expected_gradient(index)[0], rtol=1e-5)
    _assert_near(gradient, expected_gradient(index)[1])


def test_unrolled_layers_of_one_body_train_as_scanned_ones():
  scanned = _system('debug,arch=single')
  unrolled = systems.build({**to_dict(scanned.config), 'unroll': True})
  params, batch, joint = host_params(scanned), _batch(scanned), scanned.stages[1]
  (expected_loss, expected), (loss, gradient) = (
    _gradient(system, joint, batch)(params) for system in (scanned, unrolled)
  )
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  _assert_near(gradient, expected)


def test_conditions_are_dropped_at_the_configured_rates(system):
  plan, joint = system.stages
  batch = dataclasses.replace(_batch(system), example=jnp.arange(4096))
  keep = lambda drop: _system(drop=drop).dropping.keep(batch, KEY, joint)['prompt']
  share = lambda drop: float(jnp.mean(keep(drop)))
  assert abs(share(0.1) - 0.9) < 0.02 and share(0.0) == 1.0 and share(1.0) == 0.0
  assert system.dropping.keep(batch, KEY, plan)['prompt'].all()
  batch = with_inputs(batch, text_length=jnp.full(4096, 5))
  captions = lambda drop: _system(drop_text=drop).dropping.captions(batch, KEY)
  text_lengths = lambda drop: np.asarray(captions(drop).inputs['text_length'])
  assert abs((text_lengths(0.1) == 5).mean() - 0.9) < 0.02 and set(text_lengths(0.1)) == {0, 5}
  assert (text_lengths(0.0) == 5).all() and (text_lengths(1.0) == 0).all()


def test_bfloat16_agrees_with_float32(system, params, expected_gradient):
  half = systems.build({**to_dict(system.config), 'dtype': 'bfloat16'})
  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
  for index, stage in enumerate(half.stages):
    loss, gradient = _gradient(half, stage, _batch(system, 16))(params)
    expected_loss, expected = expected_gradient(index)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype('float32')}
    a, b = flat(gradient), flat(expected)
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


def test_eight_devices_give_the_loss_and_gradient_of_one(system, params, expected_gradient):
  mesh = sharding.make_mesh(MeshConfig())
  shardings = sharding.param_shardings(params, system.logical_axes, mesh, 'fsdp')
  for index, stage in enumerate(system.stages):
    with jax.set_mesh(mesh):
      sharded_params = jax.device_put(params, shardings)
      batch = sharding.put_batch(jax.tree.map(np.asarray, _batch(system, 16)), mesh)
      run = lambda p, b, s=stage: jax.value_and_grad(_total(system, s, b))(p)
      loss, gradient = jax.jit(run)(sharded_params, batch)
    np.testing.assert_allclose(loss, expected_gradient(index)[0], rtol=1e-5)
    _assert_near(gradient, expected_gradient(index)[1])


@pytest.mark.parametrize('arg', ['debug', 'tiny', 'paper'])
def test_state_is_sharded_over_eight_devices(arg):
  system = _system(arg)
  mesh = sharding.make_mesh(MeshConfig())
  for stage in range(len(system.stages)):
    state = resume.abstract_state(system.config, system, stage, mesh)
    leaves = jax.tree.leaves([state[name] for name in ('params', 'opt_state', 'ema')])
    per_device = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert per_device / sum(leaf.size for leaf in leaves) < 1 / 8 + 0.02


def test_similarity_ranks_captions_and_truncates_long_ones(system):
  data = dataclasses.replace(system.config.data, source='mixture')
  batch = small_pipeline(data).examples(range(16)).inputs
  frozen = {'siglip': weights.load('assets:siglip')[0]}
  similarity = lambda inputs: system.similarity(frozen, batch['image'], inputs)
  run = jax.jit(lambda text, length: similarity({'text': text, 'text_length': length}))
  scores = run(batch['text'], batch['text_length'])
  assert float(jnp.mean(jnp.argmax(scores, 1) == jnp.arange(16))) > 0.8
  limit = system.config.model.visual_prompt.siglip.text_length
  max_length = batch['text'].shape[1]
  assert max_length < limit
  text = jnp.where(jnp.arange(max_length) < batch['text_length'][:, None], batch['text'], 9)
  longer = lambda last: jnp.pad(
    jnp.pad(text, ((0, 0), (0, limit - max_length)), constant_values=9),
    ((0, 0), (0, 4)),
    constant_values=last,
  )
  truncated = run(longer(9)[:, :limit], jnp.full(16, limit))
  np.testing.assert_allclose(run(longer(11), jnp.full(16, limit + 4)), truncated, rtol=1e-5)
