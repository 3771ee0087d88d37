"""The KL autoencoder: shapes, moments, locality, size and cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.codecs import kl

SMALL = kl.KlConfig(
  channels=3, encoder=(16, 16), decoder=(16, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1)
)


def _init(config, side=16):
  network = kl.Autoencoder(config)
  noise = jnp.zeros((1, side // 4, side // 4, config.channels))
  return jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, side, side, 3)), noise)['params']


@pytest.fixture(scope='module')
def params():
  """Weights whose blocks are no identities, and moments that are not trivial."""
  randomized = jax.tree.map(
    lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
    _init(SMALL),
  )
  return {'image': randomized | {'scale': jnp.array([0.5, 2.0, 3.0])}}


def _images(count=2, side=32):
  return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def test_shapes_and_range(params):
  codec = kl.KlCodec(SMALL)
  latents = codec.encode(params, _images())
  assert latents.shape == (2, 8, 8, 3) and latents.dtype == jnp.float32
  assert codec.factor == 4 and codec.channels == 3
  images = codec.decode(params, 10 * latents)
  assert images.shape == (2, 32, 32, 3)
  assert float(images.min()) == 0.0 and float(images.max()) == 1.0


def test_latents_are_normalised_by_the_stored_moments(params):
  codec = kl.KlCodec(SMALL)
  plain = {'image': params['image'] | {'shift': jnp.zeros(3), 'scale': jnp.ones(3)}}
  raw, latents = codec.encode(plain, _images()), codec.encode(params, _images())
  moments = params['image']
  np.testing.assert_allclose(latents * moments['scale'] + moments['shift'], raw, atol=1e-5)
  np.testing.assert_allclose(codec.decode(params, latents), codec.decode(plain, raw), atol=1e-5)


def test_a_training_pass_without_noise_is_encode_and_decode(params):
  codec, images = kl.KlCodec(SMALL), _images().astype(jnp.float32) / 127.5 - 1.0
  rebuilt, mean, log_variance = codec.network.apply(
    {'params': params['image']}, images, jnp.zeros((2, 8, 8, 3))
  )
  clipped = jnp.clip(0.5 * (rebuilt + 1.0), 0.0, 1.0)
  expected = codec.decode(params, codec.encode(params, _images()))
  np.testing.assert_allclose(clipped, expected, atol=1e-4)
  noisy = codec.network.apply({'params': params['image']}, images, jnp.ones((2, 8, 8, 3)))[0]
  assert mean.shape == log_variance.shape
  assert float(jnp.abs(noisy - rebuilt).max()) > 1e-3


def test_distant_latents_do_not_affect_each_other(params):
  """Locality, which allows training on crops: one corner does not affect the opposite one."""
  codec, images = kl.KlCodec(SMALL), _images(1, 64)
  changed = images.at[:, :8, :8].set(255 - images[:, :8, :8])
  before, after = codec.encode(params, images), codec.encode(params, changed)
  np.testing.assert_allclose(before[:, 8:, 8:], after[:, 8:, 8:], atol=1e-6)
  assert float(jnp.abs(before - after).max()) > 1e-2


def test_blocks_are_initialized_to_the_identity():
  block = kl.Block()
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
  np.testing.assert_array_equal(block.init_with_output(jax.random.key(1), x)[0], x)


def test_the_shipped_size_has_about_a_million_parameters():
  config = kl.KlConfig()
  params = jax.eval_shape(lambda: _init(config, 64))
  assert 0.9e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 1.3e6
