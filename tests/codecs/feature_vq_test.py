"""The visual-prompt tokenizer: nearest codes, gradients, and codes that stay in use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpe_jax.codecs import feature_vq
from vpe_jax.models.siglip import SiglipConfig
from vpe_jax.models.vit import EncoderConfig
from vpe_jax.objectives import autoencoding

CONFIG = feature_vq.FeatureVqConfig(
  codes=32,
  code_width=8,
  decoder=EncoderConfig(width=16, layers=1, heads=2, mlp=32),
  siglip=SiglipConfig(
    image_size=24,
    vision=EncoderConfig(width=24, layers=2, heads=2, mlp=32),
    text=EncoderConfig(width=16, layers=1, heads=2, mlp=16),
  ),
)


@pytest.fixture(scope='module')
def codec():
  return feature_vq.FeatureVqCodec(CONFIG)


@pytest.fixture(scope='module')
def params(codec):
  images, text = jnp.zeros((1, 24, 24, 3)), jnp.zeros((1, 32), jnp.int32)
  siglip = jax.jit(codec.siglip.init)(jax.random.key(0), images, text, jnp.ones((1,), jnp.int32))
  quantizer = jax.jit(codec.quantizer.init)(jax.random.key(1), jnp.zeros((1, 9, 24)))
  return {'siglip': siglip['params'], 'feature_vq': quantizer['params'], 'image': {}}


def _images(count=4, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8))


def test_codes_are_int32_and_within_the_codebook(codec, params):
  codes = codec.encode(params, _images())
  assert codes.shape == (4, 9) and codes.dtype == jnp.int32
  assert codec.grid == 3 and codec.codes == 32
  assert int(codes.min()) >= 0 and int(codes.max()) < 32


def test_codes_are_the_nearest_entries_by_cosine(codec, params):
  features = codec.features(params, _images())
  variables = {'params': params['feature_vq']}
  out = codec.quantizer.apply(variables, features, method='quantize')
  entries = np.asarray(params['feature_vq']['codebook'], np.float64)
  entries /= np.linalg.norm(entries, axis=-1, keepdims=True)
  distance = ((np.asarray(out.projected)[..., None, :] - entries) ** 2).sum(-1)
  np.testing.assert_array_equal(out.codes, distance.argmin(-1))
  np.testing.assert_allclose(out.entries, entries[np.asarray(out.codes)], atol=1e-6)
  np.testing.assert_array_equal(out.codes, codec.encode(params, _images()))


def test_float_and_uint8_images_give_the_same_codes(codec, params):
  images = _images()
  np.testing.assert_array_equal(
    codec.encode(params, images), codec.encode(params, images.astype(jnp.float32) / 255.0)
  )


def test_codes_of_an_image_do_not_depend_on_its_batch(codec, params):
  encode = jax.jit(codec.encode)
  images = _images(8)
  np.testing.assert_array_equal(encode(params, images)[::-1], encode(params, images[::-1]))


def test_depth_selects_the_layer_of_the_features(codec, params):
  """Raw features of the last layer differ from the normed ones by exactly the final norm."""
  raw = feature_vq.FeatureVqCodec(
    feature_vq.FeatureVqConfig(**{**vars(CONFIG), 'depth': 2})
  ).features(params, _images())
  centred = raw - raw.mean(-1, keepdims=True)
  norm = params['siglip']['vision']['encoder']['norm']
  expected = centred / jnp.sqrt(centred.var(-1, keepdims=True) + 1e-6) * norm['scale']
  np.testing.assert_allclose(codec.features(params, _images()), expected + norm['bias'], atol=2e-5)


def test_the_decoder_s_gradient_passes_straight_through(codec, params):
  """The projection gets a gradient, the codebook none."""
  features = codec.features(params, _images())
  variables = {'params': params['feature_vq']}
  quantized, rebuilt = codec.quantizer.apply(variables, features)
  from_codes = codec.decode(params, quantized.codes)
  np.testing.assert_allclose(rebuilt, from_codes, atol=1e-5)

  def loss(p):
    return jnp.sum(jnp.square(codec.quantizer.apply({'params': p}, features)[1] - features))

  gradient = jax.grad(loss)(params['feature_vq'])
  assert float(jnp.abs(gradient['project']['kernel']).max()) > 0
  np.testing.assert_array_equal(gradient['codebook'], 0)


def test_dead_codes_are_revived(codec, params):
  """All codes but one start far from the data; the entropy bonus brings most into use."""
  features = jax.random.normal(jax.random.key(3), (64, 9, 24))
  initial = dict(params['feature_vq'])
  inputs = codec.quantizer.apply({'params': initial}, features, method='quantize').projected
  opposite = -jnp.mean(inputs, (0, 1))
  initial['codebook'] = opposite + 0.05 * jax.random.normal(jax.random.key(4), (32, 8))
  initial['codebook'] = initial['codebook'].at[0].set(inputs[0, 0])
  used = lambda p: float(
    autoencoding.perplexity(
      codec.quantizer.apply({'params': p}, features, method='quantize').codes, 32
    )
  )
  assert used(initial) < 5

  def loss(p):
    out, rebuilt = codec.quantizer.apply({'params': p}, features)
    per_token, of_mean = autoencoding.code_entropies(out.probabilities)
    commitment = jnp.mean(autoencoding.commitment(out.projected, out.entries))
    return jnp.mean(jnp.square(rebuilt - features)) + commitment + 0.1 * (per_token - of_mean)

  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(p, state):
    updates, state = optimizer.update(jax.grad(loss)(p), state)
    return optax.apply_updates(p, updates), state

  trained, state = initial, optimizer.init(initial)
  for _ in range(150):
    trained, state = step(trained, state)
  assert used(trained) > 16
