"""The judge: unit vectors that don't depend on how many are embedded together."""

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
def judge():
  system = systems.build(_CONFIG)
  params = jax.jit(system.init)(jax.random.key(0))
  return EvaluatorNetwork(system, params, bpe.shipped(), 'random')


def test_pictures_become_unit_vectors_whatever_their_company(judge):
  images = np.random.default_rng(0).integers(0, 256, (70, 24, 24, 3), np.uint8)
  vectors = judge.images(images)
  assert vectors.shape[0] == 70
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(judge.images(images[66:]), vectors[66:], atol=1e-6)
  assert np.ptp(vectors, axis=0).max() > 1e-3  # pictures differ


def test_a_pictures_vector_is_the_mean_over_moved_views():
  system = systems.build(_CONFIG)
  params = jax.jit(system.init)(jax.random.key(0))
  image = np.random.default_rng(1).integers(0, 256, (1, 20, 20, 3), np.uint8)
  padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)), mode='edge')
  views = np.stack([padded[y : y + 20, x : x + 20] for y in range(3) for x in range(3)])
  seen = pixels.to_signed(pixels.view(views, 16))
  each = system.network.apply({'params': params}, seen, method='embed_images')
  mean = np.mean(each, 0)
  found = EvaluatorNetwork(system, params, bpe.shipped(), 'random').images(image)[0]
  np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


def test_captions_become_unit_vectors_whatever_their_company(judge):
  captions = [f'{n} {colour} circles' for n in ('two', 'three') for colour in ('red', 'blue')]
  vectors = judge.captions(captions)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(judge.captions(captions[2:3])[0], vectors[2], atol=1e-6)


def test_a_caption_that_is_too_long_is_an_error(judge):
  with pytest.raises(UserError):
    judge.captions(['a red fox and a dog ' * 10])
