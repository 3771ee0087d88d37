"""The evaluator network: unit vectors that do not depend on the batch, and shifted views."""

import jax
import numpy as np
import pytest

from vpe_jax import systems
from vpe_jax.codecs import pixels
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork

_TOWER = {'width': 16, 'layers': 1, 'heads': 2, 'mlp': 16}
_CONFIG = {
  'name': 'siglip',
  'preset': 'test',
  'system': 'siglip',
  'stages': ['align'],
  'steps': [1],
  'batch_size': [8],
  'data': {'text_length': 16, 'image_size': 24},
  'model': {
    'siglip': {
      'image_size': 16,
      'patch': 8,
      'text_length': 16,
      'vision': dict(_TOWER),
      'text': dict(_TOWER),
    }
  },
}


@pytest.fixture(scope='module')
def model():
  """A system and its parameters."""
  system = systems.build(_CONFIG)
  return system, jax.jit(system.init)(jax.random.key(0))


@pytest.fixture(scope='module')
def network(model):
  return EvaluatorNetwork(*model, bpe.shipped(), 'random')


def test_images_become_unit_vectors_in_any_batch(network):
  images = np.random.default_rng(0).integers(0, 256, (70, 24, 24, 3), np.uint8)
  vectors = network.images(images)
  assert vectors.shape[0] == 70
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(network.images(images[66:]), vectors[66:], atol=1e-6)
  assert np.ptp(vectors, axis=0).max() > 1e-3  # the vectors of different images differ


def test_an_image_vector_is_the_mean_over_shifted_views(model, network):
  system, params = model
  image = np.random.default_rng(1).integers(0, 256, (1, 20, 20, 3), np.uint8)
  padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)), mode='edge')
  views = np.stack([padded[y : y + 20, x : x + 20] for y in range(3) for x in range(3)])
  resized = pixels.to_signed(pixels.view(views, 16))
  embed = jax.jit(lambda x: system.network.apply({'params': params}, x, method='embed_images'))
  mean = np.mean(embed(resized), 0)
  expected = mean / np.linalg.norm(mean)
  np.testing.assert_allclose(network.images(image)[0], expected, atol=1e-5)


def test_captions_become_unit_vectors_in_any_batch(network):
  captions = [f'{n} {colour} circles' for n in ('two', 'three') for colour in ('red', 'blue')]
  vectors = network.captions(captions)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(network.captions(captions[2:3])[0], vectors[2], atol=1e-6)


def test_the_shipped_network_is_loaded_and_compiled_once():
  assert EvaluatorNetwork.load() is EvaluatorNetwork.load()


def test_a_caption_that_is_too_long_is_an_error(network):
  with pytest.raises(UserError):
    network.captions(['a red fox and a dog ' * 10])
