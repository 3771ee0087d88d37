"""Codecs with bfloat16 weights compute in float32: rounding the weights is the only difference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.codecs import feature_vq, image_codes, kl, kl_vae, siglip_vq, towers, vqgan
from vpe_jax.codecs.pyramid import PyramidConfig
from vpe_jax.models import clip, siglip
from vpe_jax.models.vit import EncoderConfig
from vpe_jax.sharding import leaves_by_path

SIDE = 32
BODY = PyramidConfig((32, 32), blocks=1, outputs=8, inputs=4, attention=(1,))
TOWER = EncoderConfig(width=16, layers=2, heads=2, mlp=16, activation='gelu')
KL = kl.KlConfig(encoder=(8, 8), decoder=(8, 8))
SECTIONS = {
  'kl': kl.KlSection(encoder=(8, 8), decoder=(8, 8)),
  'image_codes': image_codes.ImageCodesSection(codes=16, autoencoder=KL),
  'kl_vae': kl_vae.KlVaeSection(body=BODY, quant=True, post_quant=True),
  'ibq': vqgan.VqGanSection(body=BODY, codes=16, width=4, normed=False, image_size=SIDE),
  'llamagen_vq': vqgan.VqGanSection(body=BODY, codes=16, width=4, normed=True, image_size=SIDE),
  'siglip_vq': siglip_vq.SiglipVqSection(
    encoder=TOWER, patch=8, table=3, codes=16, width=4, post_blocks=0, image_size=SIDE
  ),
  'feature_vq': feature_vq.FeatureVqSection(
    siglip=siglip.SiglipConfig(image_size=SIDE, patch=8, vision=TOWER, text=TOWER), codes=16
  ),
}


def _codec(section):
  if section.kind in ('image_codes', 'ibq', 'llamagen_vq'):
    return section.codec(SIDE)
  return section.codec() if section.kind in ('kl', 'kl_vae') else section.codec(jnp.float32)


def _random(shapes, seed=0):
  """Small random values in place of every parameter, which bfloat16 can't represent."""
  generator = np.random.default_rng(seed)
  sample = lambda leaf: 0.3 * generator.standard_normal(leaf.shape).astype(np.float32)
  return jax.tree.map(sample, shapes)


@pytest.mark.parametrize('kind', SECTIONS)
def test_codecs_compute_in_float32(kind):
  codec = _codec(SECTIONS[kind])
  params = _random(codec.abstract_params())
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), narrow)
  images = np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)

  def encode_and_decode(params):
    encoded = codec.encode(params, images)
    return encoded, codec.decode(params, encoded)

  ours, expected = jax.jit(encode_and_decode)(narrow), jax.jit(encode_and_decode)(rounded)
  for our_leaf, leaf in zip(ours, expected, strict=True):
    assert our_leaf.dtype == leaf.dtype
    np.testing.assert_allclose(our_leaf, leaf, rtol=1e-5, atol=1e-5)
  assert any(np.any(np.asarray(a) != b) for a, b in _pairs(params, rounded))


def _pairs(a, b):
  return zip(leaves_by_path(a).values(), leaves_by_path(b).values(), strict=True)


@pytest.mark.parametrize('encoder', ['siglip', 'siglip2', 'dinov2', 'clip'])
def test_towers_compute_in_float32(encoder):
  sizes = {'image_size': SIDE, 'patch': 8, 'vision': TOWER, 'text': TOWER}
  config = towers.TowerConfig(
    encoder=encoder,
    siglip=siglip.SiglipConfig(**sizes),
    siglip2=towers.Siglip2Config(**sizes, vocabulary=20),
    dinov2=towers.Dinov2View(image_size=48, patch=8, view=SIDE, encoder=TOWER),
    clip=towers.ClipView(**sizes, vocabulary=20, width=16, view=SIDE + 16),
  )
  tower = towers.tower(config)
  params = _random(tower.abstract_params())
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), narrow)
  images = np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
  ours, expected = (jax.jit(tower.features)(tree, images) for tree in (narrow, rounded))
  assert ours.dtype == expected.dtype == np.float32
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('module', [siglip.Siglip, clip.Clip])
def test_text_towers_compute_in_float32(module):
  sizes = {'image_size': SIDE, 'patch': 8, 'vision': TOWER, 'text': TOWER, 'vocabulary': 20}
  config = (siglip.SiglipConfig if module is siglip.Siglip else clip.ClipConfig)(
    **sizes, **({} if module is siglip.Siglip else {'text_length': 8, 'end': None, 'width': 16})
  )
  network, text = module(config), jnp.arange(16).reshape(2, 8) % 20
  inputs = (jnp.zeros((2, SIDE, SIDE, 3)), text)
  inputs += (jnp.array([3, 8]),) if module is siglip.Siglip else ()
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs)['params'])
  narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _random(shapes))
  rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), narrow)
  run = jax.jit(lambda tree: network.apply({'params': tree}, *inputs))
  np.testing.assert_allclose(run(narrow), run(rounded), rtol=1e-5, atol=1e-5)
