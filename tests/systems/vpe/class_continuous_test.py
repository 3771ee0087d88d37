"""Transfusion with a visual prompt: sequences, losses, guidance, and sampling with a cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import c2i_continuous as config_file
from tests.small_systems import encoded_examples, redrawn, request_of, with_encoded, with_inputs
from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import families
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import Batch, PlansVisually, UserError, supports, visible
from vpe_jax.models.decoder import Decoder, DecoderConfig
from vpe_jax.models.transfusion import grid_waves
from vpe_jax.objectives import flow_matching
from vpe_jax.objectives.flow_matching import FlowConfig
from vpe_jax.sampling import flow
from vpe_jax.systems.vpe import transfusion_sampler
from vpe_jax.training import resume

KEY = rng.run_key(0)
P, N, CLASSES = 9, 16, 9


def _system(arg: str = 'debug', guidance: float | None = None, **model):
  """A small system on synthetic codes: 3 x 3 of the visual prompt, 4 x 4 tokens of the image."""
  config = config_file.get_config(arg)
  if not arg.startswith('paper'):
    config.data.update(source='synthetic', image_size=32)
    config.model.visual_prompt = {'codes': 24, 'siglip': {'image_size': 24, 'patch': 8}}
    config.model.latent_size = 8
  config.model.update(model)
  if guidance is not None:
    config.sample.guidance = guidance
  return systems.build(config.to_dict())


@pytest.fixture(scope='module')
def system():
  return _system()


@pytest.fixture(scope='module')
def params(system):
  return redrawn(jax.jit(system.init)(KEY), 0.2)


def _batch(system, B: int = 4) -> Batch:
  classes = np.random.default_rng(0).integers(0, CLASSES, (B, 1))
  return with_inputs(encoded_examples(system, B), text=jnp.asarray(classes, jnp.int32))


@pytest.fixture(scope='module')
def losses(system, params):
  """The losses of batches that share their shapes, compiled once."""
  call = lambda batch, step: system.losses(params, {}, batch, KEY, step, system.stages[0])
  return jax.jit(call)


def _abstract(arg: str):
  return jax.eval_shape(_system(arg).init, KEY)


def _total(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameter_counts_lengths_and_batches_are_the_papers():
  """reference: body 357.90M, classes .896M, time 1.034M, both ends .116M; codes 14.68M."""
  without_prompt, with_prompt = _abstract('paper,vpe=false'), _abstract('paper')
  assert abs(_total(without_prompt) - 359.94e6) < 0.01e6
  assert _total(with_prompt) - _total(without_prompt) == 16_384 * 896
  assert abs(_total((without_prompt['layers'], without_prompt['norm'])) - 357.90e6) < 0.01e6
  for arg, length, sequences in (('paper', 378, 27), ('paper,vpe=false', 257, 39)):
    system = _system(arg)
    assert system.tokens(system.stages[0]) == length and 10_240 // length == sequences
    assert system.config.batch_size == (8 * sequences,)
    assert system.model.config.image_tokens == 256
    assert system.model.config.prefix_tokens == length - 257


def test_presets_build_one_module_tree_that_shards_evenly():
  trees = [set(sharding.leaves_by_path(_abstract(arg))) for arg in ('debug', 'tiny', 'paper')]
  assert trees[0] == trees[1] == trees[2]
  assert trees[0] - set(sharding.leaves_by_path(_abstract('paper,vpe=false'))) == {'embed/prefix'}
  mesh, params = sharding.make_mesh(MeshConfig()), _abstract('paper')
  axes = _system('paper').logical_axes
  shardings = sharding.param_shardings(params, axes, mesh, 'fsdp')
  sharding.check_sharded_enough(params, shardings)


def test_a_sequence_is_causal_but_for_its_image(system):
  region = system.model.slots(jnp.array([True, False]))
  mask, first = np.asarray(visible(region.visibility, region.visibility)), 1 + P
  expected = np.tril(np.ones((first + N, first + N), bool))
  expected[first:] = True
  np.testing.assert_array_equal(mask[0], expected)
  # Without visual prompt: class and image alone.
  expected[1:first] = expected[:, 1:first] = False
  np.testing.assert_array_equal(mask[1], expected)
  positions = np.asarray(region.positions)
  assert positions[0].tolist() == [*range(first), *[first] * N]
  assert positions[1, 0] == 0 and (positions[1, first:] == 1).all()


def test_position_features_encode_column_and_row():
  table = grid_waves(4, 16).reshape(4, 4, 4, 4)  # row, column, part, frequency
  # The first half of the features encodes the column, the second the row.
  np.testing.assert_array_equal(table[0, :, :2], table[3, :, :2])
  np.testing.assert_array_equal(table[:, 0, 2:], table[:, 3, 2:])
  np.testing.assert_allclose(table[2, 3, 0, 0], np.sin(3.0), rtol=1e-6)
  np.testing.assert_allclose(table[2, 3, 3], np.cos(2 * 1e4 ** (-np.arange(4) / 4)), rtol=1e-5)


def test_codes_depend_on_earlier_tokens_and_the_flow_on_all(system, params):
  """Dependence of each output on each input, by gradient through the whole network."""
  model, keep = system.model, jnp.ones((1,), bool)
  x = jnp.zeros((1, 1 + P + N, model.config.body.width)) + jax.random.normal(KEY, (1, 1 + P + N, 1))

  def states(x):
    return model.states(params, model.slots(keep).stream(x))[0]

  jacobian = jax.jacrev(lambda x: jnp.sum(jnp.square(states(x)), -1)[0])(x)
  depends = np.abs(np.asarray(jacobian[:, 0])).max(-1) > 0
  region = model.slots(keep)
  np.testing.assert_array_equal(
    depends, np.asarray(visible(region.visibility, region.visibility)[0])
  )


def test_losses_are_the_flow_and_the_cross_entropy_of_codes(system, params, losses):
  batch, c = _batch(system), system.config.model
  terms = losses(batch, jnp.int32(0))
  keep = system._keep(batch, KEY)
  assert {n: float(t.count) for n, t in terms.items()} == {
    'flow': 4 * 8 * 8 * 4,
    'next_token': P * int(keep.sum()),
    'accuracy': P * int(keep.sum()),
  }
  codes, latents = batch.encoded['visual_prompt'], batch.encoded['latents']
  x, time, target = flow_matching.noised(latents, c.flow, KEY, batch.example, tokens=16)
  classes = jnp.where(keep, batch.inputs['text'][:, 0], CLASSES)
  hidden, velocity = system.model(params, classes, codes, keep, (x, time))
  error = float(jnp.sum(jnp.square(velocity - target)))
  np.testing.assert_allclose(float(terms['flow'].sum), error, rtol=1e-5)
  logits = jax.nn.log_softmax(system.model.logits(params, hidden[:, :-1]))
  log_probs = jnp.take_along_axis(logits, codes[..., None], -1)[..., 0]
  expected = -float(jnp.sum(jnp.where(keep[:, None], log_probs, 0.0)))
  np.testing.assert_allclose(float(terms['next_token'].sum), expected, rtol=1e-5)


def test_cross_entropy_weight_follows_equation_3(system, params, losses):
  batch, total = _batch(system), system.config.steps[0]
  weights = [float(losses(batch, jnp.int32(s * total // 4))['next_token'].weight) for s in range(5)]
  np.testing.assert_allclose(weights, [0.03047, 0.03531, 0.065, 0.09469, 0.09953], atol=2e-5)
  off = _system(vp_schedule='off')
  call = lambda p: off.losses(p, {}, batch, KEY, jnp.int32(0), off.stages[0])['next_token']
  assert float(jax.jit(call)(params).weight) == 1.0


def test_without_a_visual_prompt_the_flow_is_the_only_loss():
  system = _system('debug,vpe=false')
  batch = _batch(system)
  assert batch.encoded.keys() == {'latents'} and not supports(system, PlansVisually)
  assert system.config.model.frozen.keys() == {'image'}
  params = redrawn(jax.jit(system.init)(KEY), 0.2)
  assert 'prefix' not in params['embed']
  terms = system.losses(params, {}, batch, KEY, jnp.int32(0), system.stages[0])
  assert set(terms) == {'flow'} and float(terms['flow'].weight) == 1.0
  assert set(system.counts(batch, KEY, 0, system.stages[0])) == {'flow'}


@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('scale', [1.0, 2.0, 0.0])
def test_cached_sampling_equals_whole_sequences(system, params, scale, fixed):
  settings = dataclasses.replace(system.config.sample, guidance=scale, steps=3)
  request = request_of(_batch(system, 3), *(['visual_prompt'] if fixed else []))
  sample = jax.jit(
    lambda p, r: transfusion_sampler.sample(system.model, settings, p, r, KEY, FlowConfig())
  )
  encoded, latents = sample(system.prepare(params, 'cpu'), request)
  plan = encoded['visual_prompt']
  if fixed:
    np.testing.assert_array_equal(plan, request.encoded['visual_prompt'])
  normal = lambda key: jax.random.normal(key, (8, 8, 4))
  noise = rng.per_example(normal, KEY, 'noise', request.example)
  null_class = jnp.full((3,), CLASSES, jnp.int32)

  @jax.jit
  def velocity(x, time, step):
    run = lambda classes, keep: system.model(
      params, classes, plan, jnp.full((3,), keep), (x, jnp.full((3,), time))
    )
    conditional = run(request.inputs['text'][:, 0], True)[1]
    unconditional = run(null_class, False)[1]
    return unconditional + scale * (conditional - unconditional)

  expected = flow.integrate(velocity, noise, flow.time_grid(3, settings.shift))
  np.testing.assert_allclose(latents, expected, atol=1e-4)


def test_greedy_codes_are_the_argmax_of_whole_sequences(system, params):
  settings = dataclasses.replace(system.config.sample, guidance=1.0, temperature=0.0, steps=1)
  request = request_of(_batch(system, 4))
  encoded, _ = transfusion_sampler.sample(
    system.model, settings, params, request, KEY, FlowConfig()
  )
  plan = encoded['visual_prompt']
  x = (jnp.zeros((4, 8, 8, 4)), jnp.ones((4,)))
  hidden, _ = system.model(params, request.inputs['text'][:, 0], plan, jnp.ones((4,), bool), x)
  expected = jnp.argmax(system.model.logits(params, hidden[:, :-1]), -1)
  np.testing.assert_array_equal(plan, expected)


def test_visual_prompts_are_written_alone_and_scored(system, params):
  settings = dataclasses.replace(system.config.sample, steps=1)
  request = request_of(_batch(system, 4))
  sampled, _ = transfusion_sampler.sample(
    system.model, settings, params, request, KEY, FlowConfig()
  )
  written = system.draft(params, request, KEY, settings)['visual_prompt']
  np.testing.assert_array_equal(written, sampled['visual_prompt'])
  scores = system.plan_likelihood(params, with_encoded(request, visual_prompt=written))
  x = (jnp.zeros((4, 8, 8, 4)), jnp.ones((4,)))
  hidden, _ = system.model(params, request.inputs['text'][:, 0], written, jnp.ones((4,), bool), x)
  logits = jax.nn.log_softmax(system.model.logits(params, hidden[:, :-1]))
  log_probs = jnp.take_along_axis(logits, written[..., None], -1)[..., 0]
  np.testing.assert_allclose(scores, log_probs.mean(1), rtol=1e-5)


def test_guidance_without_a_null_class_is_refused(params):
  """Before training, which would fail at the first preview, and before sampling."""
  with pytest.raises(UserError, match='without a null class'):
    _system(drop=0.0, guidance=2.0)
  system = _system(drop=0.0, guidance=1.0)
  request = request_of(_batch(system, 1), 'visual_prompt')
  settings = dataclasses.replace(system.config.sample, guidance=2.0)
  with pytest.raises(UserError, match='without a null class'):
    system.generate(params, {}, request, KEY, settings)


def test_errors_name_the_field():
  for change, message in (
    ({'drop': 1.5}, 'model.drop'),
    ({'vp_schedule': 'cosine'}, 'model.vp_schedule'),
    ({'patch': 3}, 'patch'),
    ({'latent_channels': 5}, 'model.latent_channels is 5'),
    ({'flow': {'shift': 0.0}}, 'model.flow.shift'),
    ({'flow': {'time_distribution': 'normal'}}, 'model.flow.time_distribution'),
  ):
    with pytest.raises(UserError, match=message):
      _system(**change)
  with pytest.raises(ValueError, match='vpe=maybe'):
    config_file.get_config('tiny,vpe=maybe')


def test_layers_and_norm_are_initialized_from_qwen2(tmp_path):
  """From weights in the released layout; all other parameters are random."""
  body = _system().config.model.body
  sizes = DecoderConfig(vocabulary=151_936, body=body, tied=True, context=32_768)
  qwen2 = redrawn(jax.jit(Decoder(sizes).init)(KEY), 0.2)
  families.save('qwen2', sizes, qwen2, tmp_path / 'qwen2')
  system = _system(init_from=str(tmp_path / 'qwen2'))
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    state, origins = resume.fresh_state(system, abstract, {}, KEY)
  for part in ('layers', 'norm'):
    ours, theirs = (sharding.leaves_by_path(tree[part]) for tree in (state['params'], qwen2))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
      np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
  from_qwen = {path.split('/')[0] for path, origin in origins.items() if origin != 'initialized'}
  assert from_qwen == {'layers', 'norm'} and origins['norm/scale'] == str(tmp_path / 'qwen2')
