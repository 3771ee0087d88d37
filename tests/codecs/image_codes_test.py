"""Codes of image latents: the nearest codebook entries, in raster order, encoded and decoded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.codecs import kl
from vpe_jax.codecs.image_codes import ImageCodesCodec, ImageCodesConfig
from vpe_jax.sharding import leaves_by_path

SMALL = kl.KlConfig(channels=2, encoder=(8, 8), decoder=(8, 8))


@pytest.fixture(scope='module', params=[1, 2])
def codec(request):
  return ImageCodesCodec(ImageCodesConfig(codes=16, patch=request.param), SMALL, image_size=32)


@pytest.fixture(scope='module')
def params(codec):
  image, noise = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 8, 8, 2))
  network = jax.jit(codec.latents.network.init)(jax.random.key(0), image, noise)['params']
  return {'image': network, 'image_codes': codec.init(jax.random.key(1))}


@pytest.fixture(scope='module')
def images():
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)), jnp.uint8)


def test_codes_are_the_nearest_entries(codec, params, images):
  codes = jax.jit(codec.encode)(params, images)
  patches = jax.jit(codec.latent_patches)(params, images)
  entries = params['image_codes']['codebook']
  distance = jnp.sum(jnp.square(patches[:, :, None] - entries), -1)
  np.testing.assert_array_equal(codes, jnp.argmin(distance, -1))
  assert codes.shape == (3, codec.grid**2) and codes.dtype == jnp.int32
  quantized = codec.quantize(entries, patches)
  np.testing.assert_array_equal(quantized.codes, codes)
  np.testing.assert_allclose(jnp.sum(quantized.probabilities, -1), 1.0, rtol=1e-5)
  np.testing.assert_array_equal(jnp.argmax(quantized.probabilities, -1), codes)


def test_codes_decode_at_the_positions_of_their_patches(codec, params):
  """Codes decode to the image of latents that consist of their codebook entries."""
  P = codec.grid**2
  codes = jnp.asarray(np.random.default_rng(1).integers(0, 16, (2, P)), jnp.int32)
  p, side = codec.config.patch, codec.grid
  entries = np.asarray(params['image_codes']['codebook'])[np.asarray(codes)]
  latents = np.zeros((2, side * p, side * p, 2), np.float32)
  for at in range(P):
    y, x = at // side * p, at % side * p
    latents[:, y : y + p, x : x + p] = entries[:, at].reshape(2, p, p, 2)
  expected = jax.jit(codec.latents.decode)(params, latents)
  np.testing.assert_allclose(jax.jit(codec.decode)(params, codes), expected, atol=1e-6)


def test_abstract_params_match_the_parameters(codec, params):
  shapes = {path: leaf.shape for path, leaf in leaves_by_path(codec.abstract_params()).items()}
  assert shapes == {path: leaf.shape for path, leaf in leaves_by_path(params).items()}
