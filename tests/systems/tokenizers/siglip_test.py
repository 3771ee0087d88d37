"""The SigLIP system: counts, losses with near misses, training, and sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import siglip as config_file
from tests.small_systems import with_inputs
from vpe_jax import rng, sharding, systems
from vpe_jax.config import MeshConfig, OptimConfig
from vpe_jax.contracts import Batch, LossTerm, UserError
from vpe_jax.data.embedded import shapes
from vpe_jax.data.tokenizers import bpe
from vpe_jax.training import step as training_step
from vpe_jax.training.state import first_state

KEY = rng.run_key(0)


def _system(preset='debug', **model):
  config = config_file.get_config(preset)
  config.model.update(model)
  return systems.build(config.to_dict())


@pytest.fixture(scope='module')
def system():
  return _system()


@pytest.fixture(scope='module')
def params(system):
  return jax.jit(system.init)(KEY)


def _batch(count=16, seed=0):
  """Images of one colour each, and captions with the number of the colour."""
  numpy_rng = np.random.default_rng(seed)
  kinds = numpy_rng.integers(0, 8, count)
  colours = np.array([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)]) * 200
  images = np.full((count, 64, 64, 3), 255, np.uint8)
  images[:, 16:48, 16:48] = colours[kinds][:, None, None]
  text = np.zeros((count, 32), np.int32)
  text[:, 0], text[:, 1] = 9, 20 + kinds
  length = jnp.full((count,), 2, jnp.int32)
  inputs = {'text': jnp.asarray(text), 'text_length': length, 'image': jnp.asarray(images)}
  return Batch(jnp.arange(count, dtype=jnp.int32), inputs)


def _losses(system, params, batch):
  """Compiled loss terms; constant weights stay Python numbers."""
  weights = {}

  def run(p, b):
    terms = system.losses(p, {}, b, KEY, jnp.int32(0), system.stages[0])
    weights.update({name: term.weight for name, term in terms.items()})
    return {name: (term.sum, term.count) for name, term in terms.items()}

  sums = jax.jit(run)(params, batch)
  return {name: LossTerm(*sums[name], weights[name]) for name in weights}


def test_counts_equal_those_of_the_losses(system, params):
  batch = _batch()
  terms = _losses(system, params, batch)
  counts = system.counts(batch, KEY, 0, system.stages[0])
  assert set(terms) == set(counts) == set(system.stages[0].losses)
  for name, term in terms.items():
    assert float(term.count) == float(counts[name]) == 16
  assert terms['retrieval'].weight == 0.0 and isinstance(terms['retrieval'].weight, float)


def _ranking(**model):
  """A system that ranks each caption against one near miss."""
  config = config_file.get_config('debug')
  config.data.near_misses = 1
  config.model.update(model)
  return systems.build(config.to_dict())


def _near(batch, system):
  """Adds wrong captions: the next colour's, and none for the first image."""
  text, length = batch.inputs['text'][:, None], jnp.full((16, 1), 2, jnp.int32).at[0].set(0)
  return with_inputs(batch, near=text.at[:, :, 1].add(1), near_length=length)


def test_near_misses_join_the_loss(system, params):
  ranking = _ranking()
  batch = _near(_batch(), ranking)
  shape = lambda leaf: (leaf.shape, leaf.dtype)
  assert jax.tree.map(shape, ranking.batch_spec(16).batch(False)) == jax.tree.map(shape, batch)
  terms, plain = _losses(ranking, params, batch), _losses(system, params, _batch())
  np.testing.assert_allclose(terms['sigmoid'].sum, plain['sigmoid'].sum, rtol=1e-5)
  assert terms['near'].weight == 1.0 and terms['near_retrieval'].weight == 0.0
  assert float(terms['near'].count) == float(terms['near_retrieval'].count) == 15
  assert 0 < float(terms['near'].sum) < float(plain['sigmoid'].sum)


def test_tokens_are_masked_in_the_caption_and_its_near_miss(system, params):
  plain, masking = _ranking(), _ranking(mask_tokens=1.0)
  batch = _near(_batch(), plain)
  ranked = lambda system: system._ranking_logits(apply, images, batch, KEY)
  apply = lambda *inputs, method: system.network.apply({'params': params}, *inputs, method=method)
  images = apply(batch.inputs['image'][:, :48, :48] / 127.5 - 1.0, method='embed_images')
  (right, wrong), (masked_right, masked_wrong) = ranked(plain), ranked(masking)
  captions = apply(batch.inputs['text'], batch.inputs['text_length'], method='embed_text')
  logits = apply(images, captions, method='logits')
  np.testing.assert_allclose(right, jnp.diagonal(logits), rtol=1e-5)
  assert not np.isclose(right, wrong[:, 0], atol=1e-6)[1:].any()  # the first has no near miss
  is_masked = np.isclose(masked_right, masked_wrong[:, 0], atol=1e-6)[1:]
  assert 0 < is_masked.sum() < 15
  np.testing.assert_allclose(masked_right[1:][~is_masked], right[1:][~is_masked], rtol=1e-5)
  np.testing.assert_allclose(masked_wrong[1:][~is_masked], wrong[1:][~is_masked], rtol=1e-5)


def test_recoloured_images_drop_the_word_for_their_colour(system, params):
  plain, recolouring = _ranking(), _ranking(recolour=0.5)
  captions = bpe.shipped().encode_batch([f'a {name} ring' for name in shapes.COLOURS] * 2, 32)
  ids, length = (jnp.asarray(leaf[:16]) for leaf in captions)
  ids = ids.at[8:, 1].set(bpe.shipped().encode('dog')[0])  # no word for a colour
  wrong = ids[:, None].at[:, :, 2].set(bpe.shipped().encode('star')[0])
  near = {'near': wrong, 'near_length': length[:, None]}
  batch = with_inputs(_batch(), text=ids, text_length=length, **near)
  is_recoloured = np.asarray(recolouring._recoloured(batch, KEY))
  assert (
    0 < is_recoloured[:8].sum() < 8
    and not is_recoloured[8:].any()
    and not plain._recoloured(batch, KEY).any()
  )
  terms, plain_terms = _losses(recolouring, params, batch), _losses(plain, params, batch)
  assert (
    float(terms['sigmoid'].count) == float(terms['retrieval'].count) == 16 - is_recoloured.sum()
  )
  assert float(terms['near'].count) == float(plain_terms['near'].count) == 16
  one_colour = with_inputs(batch, text=ids.at[:8, 1].set(ids[0, 1]))
  near_loss = lambda b: _losses(recolouring, params, b)['near'].sum
  recoloured_length = jnp.where(is_recoloured, 4, 0)[:, None]
  original = with_inputs(batch, near_length=recoloured_length)
  one_colour = with_inputs(one_colour, near_length=recoloured_length)
  np.testing.assert_allclose(near_loss(original), near_loss(one_colour), rtol=1e-4)


def test_words_for_colours_are_those_of_the_run_s_tokenizer(tmp_path):
  file = tmp_path / 'bpe.json'
  captions = [f'a {name} ring' for name in (*shapes.COLOURS, *shapes.TINTS)] * 5
  file.write_text(bpe.train_bpe(captions, 200).to_str())
  config = config_file.get_config('debug')
  config.model.recolour, config.data.tokenizer = 1.0, f'bpe:{file}'
  system, tokenizer = systems.build(config.to_dict()), bpe.Tokenizer(file)
  red, star = (tokenizer.encode(text)[1] for text in ('a red', 'a star'))
  assert red not in bpe.shipped().encode(' '.join(shapes.COLOURS))
  batch = _batch(2)
  batch = with_inputs(
    batch, text=jnp.zeros((2, 32), jnp.int32).at[:, 1].set(jnp.array([red, star]))
  )
  assert system._recoloured(batch, KEY).tolist() == [True, False]


def test_the_batch_has_the_declared_shapes(system):
  declared = system.batch_spec(16).batch(cached=False)
  real = _batch()
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), declared) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), real
  )


def test_repeated_captions_are_positives_of_each_other(system, params):
  """The loss of a batch with repeats equals the sigmoid loss with those pairs as positives."""
  batch = _batch()
  without_jitter = _system(jitter={'shift': 0.0, 'zoom': 0.0})
  unit = batch.inputs['image'] / 255.0
  logits = np.asarray(
    without_jitter.network.apply(
      {'params': params},
      jax.image.resize(unit, (16, 48, 48, 3), 'cubic', antialias=True) * 2 - 1,
      batch.inputs['text'],
      batch.inputs['text_length'],
    ),
    np.float64,
  )
  kinds = np.asarray(batch.inputs['text'][:, 1])
  signed = np.where(kinds[:, None] == kinds, logits, -logits)
  expected = np.log1p(np.exp(-signed)).sum()
  np.testing.assert_allclose(
    _losses(without_jitter, params, batch)['sigmoid'].sum, expected, rtol=1e-3
  )


def test_it_learns_to_retrieve(system, params):
  stage = system.stages[0]
  run = training_step.make_train_step(system, stage, OptimConfig(lr=3e-3, warmup=5))
  state = first_state(jax.tree.map(jnp.array, params), stage)
  for i in range(60):
    state, metrics = run(state, {}, _batch(64, seed=i), KEY)
  assert float(metrics['loss/retrieval']) > 0.7


def test_eight_devices_give_the_loss_and_gradient_of_one(system, params):
  batch = _batch(32)
  names = MeshConfig()
  mesh = sharding.make_mesh(names)
  shardings = sharding.param_shardings(params, system.logical_axes, mesh, 'fsdp')

  def total(p, b):
    return _losses(system, p, b)['sigmoid'].sum

  loss, gradient = jax.jit(jax.value_and_grad(total))(params, batch)
  with jax.set_mesh(mesh):
    sharded_params = jax.device_put(params, shardings)
    sharded_batch = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
    sharded_loss, sharded_gradient = jax.jit(jax.value_and_grad(total))(
      sharded_params, sharded_batch
    )
  np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), gradient, sharded_gradient
  )


@pytest.mark.parametrize('preset', ['tiny', 'evaluator_network'])
def test_shipped_sizes_shard_evenly_and_keep_their_budget(preset):
  system = _system(preset)
  params = jax.eval_shape(system.init, jax.eval_shape(lambda: rng.run_key(0)))
  assert 1.5e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 2.3e6
  mesh = sharding.make_mesh(MeshConfig())
  shardings = sharding.param_shardings(params, system.logical_axes, mesh, 'fsdp')
  sharding.check_sharded_enough(params, shardings)
  assert system.tokens(system.stages[0]) > 0


def test_the_evaluator_network_differs_from_the_tokenizer_in_seed_and_patch():
  tiny, evaluator = _system('tiny').config, _system('evaluator_network').config
  assert tiny.seed != evaluator.seed
  assert tiny.model.siglip.patch != evaluator.model.siglip.patch
  assert tiny.model.siglip.image_size != evaluator.model.siglip.image_size


def test_errors_name_the_field():
  config = config_file.get_config('debug')
  config.data.text_length = 40
  with pytest.raises(UserError, match='text_length 40 exceeds model.siglip.text_length 32'):
    systems.build(config.to_dict())
  config = config_file.get_config('debug')
  config.model.siglip.vocabulary = 512
  with pytest.raises(UserError, match='model.siglip.vocabulary is 512'):
    systems.build(config.to_dict()).preprocess  # noqa: B018
  for field in ('mask_tokens', 'recolour'):
    config = config_file.get_config('debug')
    config.data.tokenizer, config.model[field] = 'classes:cat,dog', 0.5
    with pytest.raises(UserError, match='model.mask_tokens and model.recolour .*classes:cat,dog'):
      systems.build(config.to_dict())
  config = config_file.get_config('debug')
  config.stages = ('alin',)
  with pytest.raises(UserError, match="no stage 'alin'"):
    systems.build(config.to_dict())


def test_bfloat16_compute_follows_float32(system, params):
  values = dataclasses.replace(system.config, dtype='bfloat16')
  half = type(system)(values)
  batch = _batch()
  half_losses, losses = _losses(half, params, batch), _losses(system, params, batch)
  np.testing.assert_allclose(half_losses['sigmoid'].sum, losses['sigmoid'].sum, rtol=2e-2)
