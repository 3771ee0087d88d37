"""Visual prompts: saved, read from images, scored and ranked."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import c2i_discrete, t2i
from tests.small_systems import request_of
from vpe_jax import rng, systems
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.data.tokenizers.published import open_tokenizer
from vpe_jax.data.transforms import pad_to_square
from vpe_jax.generator import Generator
from vpe_jax.systems.vpe.visual_prompts import files
from vpe_jax.systems.vpe.visual_prompts.prompter import ENTRY, VisualPrompter

PROMPTS = ['a red fox', 'two green pears']
METADATA = {'checkpoint': 'abc', 'weights': 'random (ema)'}
TOWER = {'width': 16, 'layers': 1, 'heads': 2, 'mlp': 16}
# 3 x 3 codes of 40.
READER = {
  'codes': 40,
  'decoder': TOWER,
  'siglip': {'image_size': 24, 'vision': TOWER, 'text': TOWER},
}


def _t2i(arch: str) -> systems.System:
  config = t2i.get_config(f'debug,arch={arch}')
  config.model.update(codes=40, visual_prompt=READER, latent_size=8)
  config.model.dual_path.encoder.layers = config.model.head.layers = 1
  config.data.image_size = 32
  config.sample.steps = 2
  return systems.build(config.to_dict())


def _c2i(arg: str = 'debug') -> systems.System:
  config = c2i_discrete.get_config(arg)
  config.model.update(classes=2, visual_prompt=READER, image={'codes': 24, 'patch': 2})
  config.data.update(image_size=16, tokenizer='classes:red,blue')
  config.model.body.layers = 1
  return systems.build(config.to_dict())


def _prompter(system: systems.System) -> VisualPrompter:
  """Random weights, generated on the host: none is zero, and nothing is compiled for them."""
  numpy_rng = np.random.default_rng(0)
  random = lambda leaf: 0.3 * numpy_rng.standard_normal(leaf.shape, np.float32)
  shapes = jax.eval_shape(system.init, jax.random.key(0)), system.frozen_shapes()
  params, frozen = jax.tree.map(random, shapes)
  tokenizer = open_tokenizer(system.config.data.tokenizer)
  return VisualPrompter(Generator(system, params, frozen, tokenizer, METADATA))


@pytest.fixture(scope='module')
def internal():
  return _prompter(_t2i('internal'))


@pytest.fixture(scope='module', params=['internal', 'external', 'classes'])
def prompter(request, internal):
  if request.param == 'internal':
    return internal
  return _prompter(_c2i() if request.param == 'classes' else _t2i('external'))


@pytest.fixture
def prompts(prompter):
  return ['red', 'blue'] if prompter.system.config.system == 'c2i_discrete' else PROMPTS


def _assert_equal(ours, theirs, levels=0):
  """Images may differ by `levels` of 255: rounding depends on the position in a batch."""
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a.encoded[ENTRY], b.encoded[ENTRY])
    assert np.abs(a.image.astype(int) - b.image.astype(int)).max() <= levels
    assert (a.prompt, a.index, a.seed) == (b.prompt, b.index, b.seed)


@pytest.mark.parametrize('ending', files.ENDINGS)
def test_a_saved_visual_prompt_renders_the_same_image(prompter, prompts, tmp_path, ending):
  sampled = prompter.generator(prompts, n=2, seed=3)
  path = str(tmp_path / f'x{ending}')
  prompter.of(sampled).save(path)
  loaded = files.load(path)
  rendered = prompter.render(loaded, seed=3)
  _assert_equal(rendered, sampled)
  assert rendered[0].metadata == {**sampled[0].metadata, 'visual_prompt': 'sampled'}
  assert loaded.provenance['seed'] == '3' and json.loads(loaded.provenance['settings'])
  written = prompter.write(prompts, n=2, seed=3)
  np.testing.assert_array_equal(written.codes, loaded.codes)
  assert (written.prompts, written.index) == (loaded.prompts, loaded.index)
  # Another seed changes the noise, not the visual prompt.
  reseeded = prompter.render(loaded, seed=4)
  assert all((a.image != b.image).any() for a, b in zip(reseeded, sampled))
  np.testing.assert_array_equal([p.encoded[ENTRY] for p in reseeded], loaded.codes)


def test_the_best_visual_prompts_are_rendered_in_the_order_of_their_scores(prompter, prompts):
  candidates = prompter.generator(prompts, n=5, seed=1)
  scores = prompter.score(prompter.of(candidates)).reshape(2, 5)
  best = prompter.best_of(prompts, count=5, render=3, seed=1)
  order = files.best(scores, 3)
  assert [p.index for p in best] == order.reshape(-1).tolist()
  _assert_equal(
    best, [candidates[5 * prompt + rank] for prompt in (0, 1) for rank in order[prompt]], 1
  )
  metadata = [p.metadata for p in best]
  assert [m['rank'] for m in metadata] == ['1', '2', '3'] * 2
  assert {(m['plans'], m['ranked_by']) for m in metadata} == {('5', 'likelihood')}
  best_scores = np.asarray([float(m['score']) for m in metadata]).reshape(2, 3)
  np.testing.assert_allclose(best_scores, -np.sort(-scores)[:, :3], rtol=1e-5)
  assert (np.diff(best_scores) <= 0).all() and np.ptp(scores) > 0


def _log_probabilities(prompter, plans):
  """Log-probability of each code, from the logits of the uncached network."""
  system, params = prompter.system, prompter.generator.params
  _, request = prompter._request(plans)
  codes = request.encoded['visual_prompt']
  if system.config.system == 'c2i_discrete':
    image = jnp.zeros((len(plans), system.model.config.image_tokens), jnp.int32)
    logits = jax.jit(system.model)(params, request.inputs['text'][:, 0], image, codes)
    c = system.model.config
    logits = logits[:, : c.prefix_tokens, c.codes :]
  else:
    regions = system.experts.regions(request, codes, jnp.ones(len(plans), bool))
    latents = jnp.zeros((len(plans), *system.batch_spec(1).encoded['latents'].shape[1:]))
    noisy = (latents, jnp.zeros(len(plans)))
    forward = jax.jit(lambda p: system.experts.forward(p, regions, noisy, None))
    hidden, _ = forward(params)
    first = system.layout.place('bot')[0]
    logits = system.model.code_logits(params, hidden[:, first : first + plans.codes.shape[1]])
  logits = np.asarray(logits, np.float64)
  chosen = np.take_along_axis(logits, plans.codes[..., None], -1)[..., 0]
  return chosen - np.log(np.exp(logits).sum(-1))


def test_likelihood_is_the_mean_log_probability_of_the_codes(prompter, prompts):
  plans = prompter.write(prompts, n=2, seed=2)
  expected = _log_probabilities(prompter, plans).mean(1)
  np.testing.assert_allclose(prompter.score(plans), expected, rtol=1e-5)
  permuted = plans.take([1, 0, 3, 2])
  np.testing.assert_allclose(prompter.score(permuted), expected[[1, 0, 3, 2]], rtol=1e-5)
  # The likelihood depends on the prompt: the same codes score differently under the other one.
  swapped = plans.with_prompts([*plans.prompts[2:], *plans.prompts[:2]])
  assert np.abs(prompter.score(swapped) - expected).min() > 1e-4


def test_similarity_compares_the_prompt_with_the_decoded_codes(internal):
  plans = internal.write(PROMPTS, n=2, seed=2)
  scores = internal.score(plans, 'similarity')
  codec, frozen = internal.system.visual_prompt, internal.generator.frozen
  ids, length = bpe.shipped().encode_batch(plans.prompts, 32)

  @jax.jit
  def vectors(frozen):
    variables, features = {'params': frozen['siglip']}, codec.decode(frozen, plans.codes)
    image_vectors = codec.siglip.apply(variables, features, method='pool')
    return image_vectors, codec.siglip.apply(variables, ids, length, method='embed_text')

  image_vectors, text_vectors = vectors(frozen)
  np.testing.assert_allclose(scores, np.sum(image_vectors * text_vectors, -1), atol=1e-5)
  best = internal.best_of(PROMPTS, count=2, rank='similarity', seed=2)
  assert [p.index for p in best] == np.argmax(scores.reshape(2, 2), 1).tolist()
  assert {p.metadata['ranked_by'] for p in best} == {'similarity'}


def test_visual_prompts_do_not_depend_on_the_noise_of_the_image(prompter, prompts, monkeypatch):
  system = prompter.system
  is_flow = system.config.system == 't2i'
  # Guidance and more steps would only compile and run longer.
  settings = prompter.generator.settings(guidance=1.0, **({'steps': 1} if is_flow else {}))
  _, request = prompter._request(prompter.write(prompts, n=2, seed=5))
  request = jax.tree.map(jnp.asarray, request_of(request))
  stream = rng.stream
  image_stream = 'noise' if is_flow else 'codes'

  @jax.jit
  def generate(change):
    """Generates with other random numbers for the image where `change` isn't 0."""
    folded = lambda key, name: jax.random.fold_in(key, change if name == image_stream else 0)
    monkeypatch.setattr(rng, 'stream', lambda key, name: stream(folded(key, name), name))
    inputs = (prompter.generator.params, prompter.generator.frozen, request, rng.run_key(5))
    return system.generate(*inputs, settings)

  baseline, changed = generate(0), generate(1)
  baseline, changed = (jax.device_get(generated.encoded) for generated in (baseline, changed))
  np.testing.assert_array_equal(baseline['visual_prompt'], changed['visual_prompt'])
  assert (baseline['latents'] != changed['latents']).any()


def test_reading_an_image_encodes_it_as_in_training(prompter, prompts):
  numpy_rng = np.random.default_rng(0)
  images = [numpy_rng.integers(0, 256, shape, np.uint8) for shape in ((50, 30, 3), (20, 64, 3))]
  plans = prompter.read(images, prompts)
  side = prompter.system.config.data.image_size
  squares = jnp.asarray(np.stack([pad_to_square(p, side) for p in (*images, *images)]))
  encode = jax.jit(prompter.system.encode)
  encoded = encode(prompter.generator.frozen, {'image': squares}, rng.run_key(0))
  np.testing.assert_array_equal(plans.codes, encoded['visual_prompt'][:2])
  assert plans.prompts == tuple(prompts) and plans.provenance['by'] == 'read from an image'
  assert len(prompter.render(plans)) == 2
  with pytest.raises(UserError, match='a prompt is blank'):
    prompter.render(prompter.read(images))


def test_a_fingerprint_depends_on_the_codebook_values_alone(internal, tmp_path):
  book = internal.codebook
  assert book.size == 40 and len(book.fingerprint) == 12
  devices = np.asarray(jax.devices()).reshape(-1)[:8]
  mesh = jax.sharding.Mesh(devices, ('x',))
  sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  feature_vq = dict(internal.generator.frozen['feature_vq'])
  path = str(tmp_path / 'x.safetensors')
  weights.save(path, feature_vq, {}, dtype='float32')
  changed = feature_vq['codebook'].at[3, 0].add(1e-3)
  for values, same in (
    (jax.device_put(feature_vq['codebook'], sharded), True),
    (weights.load(path)[0]['codebook'], True),
    (changed, False),
  ):
    generator = copy.copy(internal.generator)
    generator.__dict__.pop('draft_networks', None)
    generator.frozen = {**generator.frozen, 'feature_vq': {**feature_vq, 'codebook': values}}
    assert (VisualPrompter(generator).codebook == book) == same


def test_visual_prompts_of_another_model_are_refused(internal):
  plans = internal.write('a red fox')
  other = dataclasses.replace(plans, codebook=files.Codebook(40, 'f' * 12))
  for use in (internal.render, internal.score):
    with pytest.raises(UserError, match=f'ffffffffffff, .*{internal.codebook.fingerprint}'):
      use(other)
  small = files.VisualPrompts(plans.codes[:, :4], plans.prompts, (0,), plans.codebook, {})
  with pytest.raises(UserError, match='2 x 2 codes .* 3 x 3'):
    internal.render(small)


def test_errors_are_raised_before_anything_is_sampled(internal, monkeypatch):
  monkeypatch.setattr(internal, 'write', None)
  with pytest.raises(UserError, match="called 'likelyhood'; did you mean 'likelihood'"):
    internal.best_of('a', rank='likelyhood')
  with pytest.raises(UserError, match='the best 3 of 2 visual prompts: 1 to 2'):
    internal.best_of('a', count=2, render=3)
  with pytest.raises(UserError, match='temperature 0 writes 2 equal'):
    internal.best_of('a', count=2, settings=internal.generator.settings(temperature=0.0))


def test_errors_name_missing_capabilities():
  bare = Generator.__new__(Generator)
  bare.system = _c2i()
  with pytest.raises(UserError, match='by similarity: .*rank by likelihood'):
    VisualPrompter(bare).check_ranker('similarity')
  bare.system = _c2i('debug,vpe=false')
  with pytest.raises(UserError, match='does not write visual prompts'):
    VisualPrompter(bare)
  config = t2i.get_config('debug')
  config.data.source = 'synthetic'
  bare.system, bare.frozen = systems.build(config.to_dict()), {}
  bare._mesh = None  # one device
  with pytest.raises(UserError, match='trained on synthetic codes'):
    VisualPrompter(bare).check_codebook()
