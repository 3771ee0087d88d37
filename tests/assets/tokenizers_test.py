"""The shipped tokenizers reach the held-out metrics that configs/README.md states."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import codec as codec_config
from configs import siglip as siglip_config
from vpe_jax import rng, systems
from vpe_jax.checkpoints import weights
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.objectives import autoencoding

COUNT = 256


def _system(config):
  return systems.build(config.to_dict())


@pytest.fixture(scope='module')
def codec():
  return _system(codec_config.get_config('tiny'))


@pytest.fixture(scope='module')
def frozen():
  return {name: weights.load(f'assets:{name}')[0] for name in ('siglip', 'feature_vq', 'image')}


@pytest.fixture(scope='module')
def batch(codec):
  return Pipeline.of(codec, 'combination').examples(range(COUNT))


def _model(name):
  """The model section of an asset's config; fields added later have their defaults."""
  stored = json.loads(weights.load(f'assets:{name}')[1]['config'])
  return dataclasses.asdict(systems.build(stored).config.model)


@pytest.mark.parametrize(
  'preset, name', [('tiny', 'siglip'), ('evaluator_network', 'evaluator_network')]
)
def test_shipped_towers_retrieve_held_out_captions(preset, name):
  config = siglip_config.get_config(preset)
  config.model.update(mask_tokens=0.0, recolour=0.0)  # whole captions and true colours
  system = _system(config)
  params, _ = weights.load(f'assets:{name}')
  assert _model(name)['siglip'] == dataclasses.asdict(system.config.model.siglip)
  examples = Pipeline.of(system, 'combination').examples(range(COUNT))
  stage = system.stages[0]
  terms = jax.jit(lambda p, b: system.losses(p, {}, b, rng.run_key(0), jnp.int32(0), stage))(
    params, examples
  )
  hits = {name: float(term.sum / term.count) for name, term in terms.items()}
  assert hits['retrieval'] > 0.9
  assert ('near_retrieval' in hits) == (preset == 'evaluator_network')
  assert hits.get('near_retrieval', 1.0) > 0.6


def test_shipped_codes_use_the_codebook_and_retrieve_captions(codec, frozen, batch):
  stored = _model('feature_vq')['feature_vq']
  shape = dataclasses.asdict(codec.config.model.feature_vq)
  assert {**stored, 'temperature': 0} == {**shape, 'temperature': 0}
  feature_codec = codec.feature_codec
  codes = jax.jit(feature_codec.encode)(frozen, batch.inputs['image'])
  assert float(autoencoding.perplexity(codes, feature_codec.codes)) >= 0.25 * feature_codec.codes
  stage = next(s for s in codec.stages if s.name == 'feature_vq')
  terms = jax.jit(lambda p, f, b: codec.losses(p, f, b, rng.run_key(0), jnp.int32(0), stage))(
    frozen, frozen, batch
  )
  assert float(terms['retrieval'].sum) / COUNT > 0.85
  assert float(terms['features'].sum) / COUNT < 0.25


def test_shipped_autoencoder_is_sharp_and_normalised(codec, frozen, batch):
  stored = _model('image')['image']
  assert stored == dataclasses.asdict(codec.config.model.image)
  latent_codec = codec.latent_codec
  latents = jax.jit(latent_codec.encode)(frozen, batch.inputs['image'])
  reconstruction = jax.jit(latent_codec.decode)(frozen, latents)
  originals = jnp.asarray(batch.inputs['image']) / 255.0
  assert float(jnp.mean(autoencoding.psnr(reconstruction, originals))) >= 26.0
  np.testing.assert_allclose(jnp.mean(latents, (0, 1, 2)), 0.0, atol=0.15)
  np.testing.assert_allclose(jnp.std(latents, (0, 1, 2)), 1.0, atol=0.15)


def test_shipped_image_codes_reconstruct_images_and_use_the_codebook(codec, frozen, batch):
  assert _model('image_codes')['image_codes'] == dataclasses.asdict(codec.config.model.image_codes)
  networks = {**frozen, 'image_codes': weights.load('assets:image_codes')[0]}
  codes = jax.jit(codec.image_codec.encode)(networks, batch.inputs['image'])
  reconstruction = jax.jit(codec.image_codec.decode)(networks, codes)
  assert float(jnp.mean(autoencoding.psnr(reconstruction, batch.inputs['image'] / 255.0))) >= 27.0
  assert len(np.unique(codes)) > 0.9 * codec.image_codec.codes
