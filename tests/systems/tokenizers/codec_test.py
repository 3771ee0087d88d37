"""The codec system: its stages, their trained networks, and the normalization of latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import codec as config_file
from tests.small_systems import with_inputs
from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import MeshConfig, OptimConfig
from vpe_jax.contracts import Batch, LossTerm, UserError
from vpe_jax.evaluation import heldout
from vpe_jax.systems.tokenizers import codec
from vpe_jax.training import step as training_step
from vpe_jax.training.state import first_state

KEY = rng.run_key(0)
TOWER = {'width': 32, 'layers': 1, 'heads': 2, 'mlp': 64}


def _system(arg='debug', **model):
  config = config_file.get_config(arg)
  config.model.update(model)
  if arg.startswith('debug'):
    config.model.feature_vq.siglip = {'vision': dict(TOWER), 'text': dict(TOWER)}
  return systems.build(config.to_dict())


@pytest.fixture(scope='module')
def system():
  return _system()


@pytest.fixture(scope='module')
def params(system):
  return jax.jit(system.init)(KEY)


@pytest.fixture(scope='module')
def frozen(system):
  images, text = jnp.zeros((1, 48, 48, 3)), jnp.zeros((1, 32), jnp.int32)
  length = jnp.ones((1,), jnp.int32)
  init = jax.jit(system.feature_codec.siglip.init)
  return {'siglip': init(jax.random.key(5), images, text, length)['params']}


def _batch(count=8, seed=0):
  numpy_rng = np.random.default_rng(seed)
  images = np.full((count, 64, 64, 3), 255, np.uint8)
  for i in range(count):
    x, y = numpy_rng.integers(0, 40, 2)
    images[i, y : y + 20, x : x + 20] = numpy_rng.integers(0, 256, 3)
  inputs = {
    'text': jnp.asarray(numpy_rng.integers(8, 1024, (count, 32)), jnp.int32),
    'text_length': jnp.full((count,), 5, jnp.int32),
    'image': jnp.asarray(images),
  }
  return Batch(jnp.arange(count, dtype=jnp.int32), inputs)


def _losses(system, params, frozen, batch, stage):
  """Compiled loss terms; constant weights stay Python numbers."""
  loss_weights = {}

  def run(p, f, b):
    terms = system.losses(p, f, b, KEY, jnp.int32(0), stage)
    loss_weights.update({name: term.weight for name, term in terms.items()})
    return {name: (term.sum, term.count) for name, term in terms.items()}

  sums = jax.jit(run)(params, frozen, batch)
  return {name: LossTerm(*sums[name], loss_weights[name]) for name in loss_weights}


@pytest.mark.parametrize('index', [0, 1])
def test_counts_equal_those_of_the_losses(system, params, frozen, index):
  batch, stage = _batch(), system.stages[index]
  terms = _losses(system, params, frozen, batch, stage)
  counts = system.counts(batch, KEY, 0, stage)
  assert list(terms) == list(counts) == list(stage.losses)
  assert all(float(t.count) == float(counts[n]) for n, t in terms.items())
  logged = {n for n, t in terms.items() if isinstance(t.weight, float) and t.weight == 0.0}
  assert logged == ({'perplexity', 'retrieval'} if index == 0 else {'psnr'})


def test_losses_of_the_other_stage_are_logged_only(system, params, frozen):
  stage = system.stages[0]
  both = heldout.with_all_losses(system.stages, 0)
  terms = _losses(system, params, frozen, _batch(), both)
  assert set(terms) == {name for stage in system.stages for name in stage.losses}
  for name, term in terms.items():
    assert (term.weight == 0.0) == (name not in stage.losses or name in ('perplexity', 'retrieval'))


@pytest.mark.parametrize('index', [0, 1])
def test_a_stage_trains_its_network_and_nothing_else(system, params, frozen, index):
  stage = system.stages[index]
  run = training_step.make_train_step(system, stage, OptimConfig(lr=1e-2, warmup=1))
  state, first = run(first_state(jax.tree.map(jnp.array, params), stage), frozen, _batch(), KEY)
  for _ in range(15):
    state, last = run(state, frozen, _batch(), KEY)
  assert float(last['loss']) < float(first['loss'])
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state['params'], dict(params))
  trained, untouched = stage.name, system.stages[1 - index].name
  assert any(jax.tree.leaves(moved[trained])) and not any(jax.tree.leaves(moved[untouched]))
  assert not moved['image']['shift'] and not moved['image']['scale']


def test_the_codebook_moves_to_the_latents():
  system = _system('debug,stage=image_codes', image_codes={'codes': 16})
  frozen = {'image': weights.load('assets:image')[0]}
  stage, batch = system.stages[0], _batch()
  params = jax.jit(system.init)(KEY)
  assert set(params) == {'image_codes'} and set(system.frozen) == {'image'}
  terms = _losses(system, params, frozen, batch, stage)
  assert list(terms) == list(system.counts(batch, KEY, 0, stage)) == list(stage.losses)
  patches = jax.eval_shape(system.encode, frozen, batch.inputs, KEY)['latent_patches']
  assert patches.shape == (8, system.tokens(stage), 4)
  run = training_step.make_train_step(system, stage, OptimConfig(lr=3e-2, warmup=1))
  state, first = run(first_state(params, stage), frozen, batch, KEY)
  for _ in range(30):
    state, last = run(state, frozen, batch, KEY)
  assert float(last['loss/distance']) < 0.7 * float(first['loss/distance'])
  assert float(last['loss/codes_perplexity']) > float(first['loss/codes_perplexity'])


def test_a_run_has_the_networks_of_its_stages_only():
  tokens, latents = _system('debug,stage=feature_vq'), _system('debug,stage=image')
  shapes = lambda s: jax.eval_shape(s.init, jax.eval_shape(lambda: rng.run_key(0)))
  assert set(shapes(tokens)) == {'feature_vq'} and set(shapes(latents)) == {'image'}
  assert set(tokens.frozen) == {'siglip'} and not latents.frozen


def test_normalised_latents_have_mean_zero_and_variance_one(system, params):
  images = _batch(64).inputs['image']
  normalized = system.normalize_latents(params['image'], images)
  latents = system.latent_codec.encode({'image': normalized}, images)
  np.testing.assert_allclose(jnp.mean(latents, (0, 1, 2)), 0.0, atol=1e-3)
  np.testing.assert_allclose(jnp.std(latents, (0, 1, 2)), 1.0, atol=1e-3)
  before = system.latent_codec.decode(params, system.latent_codec.encode(params, images[:4]))
  after = system.latent_codec.decode({'image': normalized}, latents[:4])
  np.testing.assert_allclose(before, after, atol=1e-4)


def test_moments_are_measured_in_batches_and_ignore_incomplete_latents(system, params):
  images = _batch(codec.MOMENTS_BATCH + 3).inputs['image'][:, :62, :62]
  whole = {'image': params['image']}
  latents = system.latent_codec.encode(whole, images[:, :60, :60])
  normalized = system.normalize_latents(params['image'], np.asarray(images))
  np.testing.assert_allclose(normalized['shift'], jnp.mean(latents, (0, 1, 2)), atol=1e-5)
  np.testing.assert_allclose(normalized['scale'], jnp.std(latents, (0, 1, 2)), rtol=1e-4)
  text = str(jax.make_jaxpr(system.normalize_latents)(params['image'], images))
  assert f'f32[{codec.MOMENTS_BATCH},1,30,30,' in text  # activations at half resolution
  assert f'f32[{codec.MOMENTS_BATCH + 3},30,30,' not in text


def test_captions_longer_than_the_text_tower_are_truncated(system, params, frozen):
  batch, stage = _batch(), system.stages[0]
  longer = jnp.pad(batch.inputs['text'], ((0, 0), (0, 8)), constant_values=9)
  length = batch.inputs['text_length'].at[0].set(40)
  with_text = lambda text, length: with_inputs(batch, text=text, text_length=length)
  terms = _losses(system, params, frozen, with_text(longer, length), stage)
  expected = _losses(
    system, params, frozen, with_text(longer[:, :32], jnp.minimum(length, 32)), stage
  )
  np.testing.assert_array_equal(terms['retrieval'].sum, expected['retrieval'].sum)


def test_raw_features_have_no_pooled_losses():
  model = {'feature_vq': {'depth': 1, 'decoder': dict(TOWER)}}
  system = _system('debug,stage=feature_vq', **model)
  assert 'pooled' not in system.stages[0].losses


def test_shipped_sizes_shard_evenly_and_keep_their_budget():
  system = _system('tiny')
  params = jax.eval_shape(system.init, jax.eval_shape(lambda: rng.run_key(0)))
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert size(params['feature_vq']) < 0.3e6 and size(params['image']) < 1.3e6
  mesh = sharding.make_mesh(MeshConfig())
  shardings = sharding.param_shardings(params, system.logical_axes, mesh, 'fsdp')
  sharding.check_sharded_enough(params, shardings)
  for stage in system.stages:
    assert system.tokens(stage) > 0


def test_errors_name_the_field():
  with pytest.raises(UserError, match="no stage 'imag'; did you mean 'image'"):
    config = config_file.get_config('debug')
    config.stages, config.steps, config.batch_size = ('imag',), (4,), (8,)
    systems.build(config.to_dict())
  with pytest.raises(UserError, match='model.crop 30 must be a multiple of 4'):
    _system(crop=30)
  config = config_file.get_config('debug,stage=feature_vq')
  config.model.feature_vq.siglip = {'vocabulary': 512}
  with pytest.raises(UserError, match='model.feature_vq.siglip.vocabulary is 512'):
    systems.build(config.to_dict()).preprocess  # noqa: B018
