"""Tests of KL autoencoders against diffusers: outputs, gradients and exact round trips."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vpe_jax.checkpoints.families import kl_vae
from vpe_jax.codecs.kl_vae import KlVae, KlVaeCodec
from vpe_jax.contracts import UserError

pytestmark = pytest.mark.parity
NAME = 'kl_vae'
SMALL = {
  'down_block_types': ['DownEncoderBlock2D'] * 2,
  'up_block_types': ['UpDecoderBlock2D'] * 2,
  'block_out_channels': [16, 32],
  'norm_num_groups': 8,
  'sample_size': 16,
}
WITHOUT_QUANT_CONV = {'use_quant_conv': False, 'use_post_quant_conv': False}
KINDS = {
  'flux': {
    **SMALL,
    **WITHOUT_QUANT_CONV,
    'latent_channels': 6,
    'scaling_factor': 0.36,
    'shift_factor': 0.11,
  },
  'sdxl': {**SMALL, 'latent_channels': 4, 'scaling_factor': 0.13},
}
PUBLISHED = {'flux': (16, 83_819_683), 'sd3': (16, 83_819_683), 'sdxl': (4, 83_653_863)}


@pytest.fixture(scope='module', params=KINDS)
def saved(parity, tmp_path_factory, request):
  """A small reference model with random parameters, and its folder."""
  import diffusers

  model = parity.randomize(diffusers.AutoencoderKL(**KINDS[request.param]))
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope='module')
def imported(parity, saved):
  return parity.load(NAME, saved[1])


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)


def _nchw(array):
  import torch

  return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2)


def _nhwc(tensor):
  return tensor.detach().permute(0, 2, 3, 1).numpy()


def test_outputs_and_gradients_equal_diffusers(parity, saved, imported, images, tmp_path):
  model, network = saved[0], KlVae(imported.sizes)
  signed = 2 * images - 1
  pixels = _nchw(signed).requires_grad_()
  posterior = model.encode(pixels).latent_dist
  decoded = model.decode(posterior.mean).sample
  # Gradients are taken of the decoded image and of both moments.
  theirs = (decoded, posterior.mean, posterior.logvar)
  rng = np.random.default_rng(1)
  weights = [rng.standard_normal(_nhwc(part).shape).astype(np.float32) for part in theirs]

  def total(params, images):
    variables = {'params': params}
    posterior = network.apply(variables, images, method='posterior')
    decoded = network.apply(variables, posterior.mean, method='decode')
    parts = (decoded, *posterior)
    return sum(jnp.sum(part * weight) for part, weight in zip(parts, weights)), parts

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (_, ours), (param_grads, image_grads) = run(imported.params, signed)
  for part, expected in zip(ours, theirs, strict=True):
    parity.assert_close(part, _nhwc(expected))
  model.zero_grad()
  sum((part * _nchw(weight)).sum() for part, weight in zip(theirs, weights)).backward()
  parity.assert_close(image_grads, _nhwc(pixels.grad), 1e-4)
  parity.check_gradients(NAME, imported.sizes, param_grads, model, tmp_path / 'gradients')


def test_codec_normalises_latents_like_diffusers_pipelines(parity, saved, imported, images):
  import torch

  model, config = saved[0], saved[0].config
  codec, params = KlVaeCodec(imported.sizes), {'image': imported.params}
  keys = jax.random.split(jax.random.key(2), 2)
  noise = jnp.stack([jax.random.normal(key, (8, 12, codec.channels)) for key in keys])
  encode = jax.jit(codec.encode)
  with torch.no_grad():
    posterior = model.encode(2 * _nchw(images) - 1).latent_dist
    normal = lambda x: (x - (config.shift_factor or 0.0)) * config.scaling_factor
    parity.assert_close(encode(params, images), _nhwc(normal(posterior.mean)))
    sample = posterior.mean + posterior.std * _nchw(np.asarray(noise))
    parity.assert_close(encode(params, images, keys), _nhwc(normal(sample)), 1e-4)  # std amplifies
    latents = normal(posterior.mean)
    decoded = model.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
    expected = _nhwc((decoded / 2 + 0.5).clamp(0, 1))
  parity.assert_close(jax.jit(codec.decode)(params, _nhwc(latents)), expected)
  assert codec.factor == 2 and codec.network_names == ('image',)


def test_bfloat16_stays_close_to_float32(parity, imported, images):
  params = {'image': imported.params}
  float32, bfloat16 = (
    KlVaeCodec(imported.sizes, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
  )
  latents = jax.jit(float32.encode)(params, images)
  rounded = jax.jit(bfloat16.encode)(params, images)
  assert rounded.dtype == jnp.float32 and not np.array_equal(rounded, latents)
  parity.assert_close(rounded, latents, 0.05)


def test_raw_deviation_scales_noise_without_normalisation(imported, images):
  raw = dataclasses.replace(imported.sizes, raw_deviation=True)
  params, keys = {'image': imported.params}, jax.random.split(jax.random.key(0), 2)
  mean, plain, quirk = (
    np.asarray(jax.jit(KlVaeCodec(sizes).encode)(params, images, each))
    for sizes, each in ((raw, None), (imported.sizes, keys), (raw, keys))
  )
  np.testing.assert_allclose((quirk - mean) * raw.scale[0], plain - mean, rtol=1e-3, atol=1e-5)


def test_round_trip_is_exact_and_diffusers_opens_it(parity, saved, imported, tmp_path):
  import diffusers

  parity.check_round_trip(NAME, saved[1], imported, tmp_path / 'out')
  model, info = diffusers.AutoencoderKL.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  for field in ('scaling_factor', 'shift_factor', 'use_quant_conv', 'norm_num_groups'):
    assert model.config[field] == saved[0].config[field]


def test_old_names_of_attention_layers_are_imported(parity, saved, imported, tmp_path):
  names = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
  tensors = {}
  for key, leaf in saved[0].state_dict().items():
    for new, old in names.items():
      key = key.replace(f'attentions.0.{new}.', f'attentions.0.{old}.')
    tensors[key] = leaf.numpy()
  safetensors.numpy.save_file(tensors, tmp_path / 'diffusion_pytorch_model.safetensors')
  (tmp_path / 'config.json').write_text((saved[1] / 'config.json').read_text())
  reloaded = parity.load(NAME, tmp_path)
  assert 'query' in str(sorted(reloaded.tensor_map.destinations))
  jax.tree.map(np.testing.assert_array_equal, reloaded.params, imported.params)


def test_every_bias_and_norm_matters(parity, imported, images):
  network = KlVae(imported.sizes)

  @jax.jit
  def apply(params):
    # The decoded image alone does not depend on the log-variance.
    posterior = network.apply({'params': params}, images, method='posterior')
    decoded = network.apply({'params': params}, posterior.mean, method='decode')
    return jnp.concatenate([part.ravel() for part in (*posterior, decoded)])

  # The bias of k shifts all logits of a query equally, which softmax ignores.
  insensitive = [p for p in parity.insensitive(imported.params, apply) if not p.endswith('/k/bias')]
  assert not insensitive
  expected = apply(imported.params)
  body = dataclasses.replace(imported.sizes.body, groups=4)
  network = KlVae(dataclasses.replace(imported.sizes, body=body))
  means = jax.jit(lambda p: network.apply({'params': p}, images, method='posterior').mean.ravel())
  shifted = means(imported.params)
  assert np.max(np.abs(shifted - expected[: shifted.size])) > 1e-3 * np.max(np.abs(expected))


@pytest.mark.parametrize('kind', PUBLISHED)
def test_published_sizes(parity, kind):
  channels, total = PUBLISHED[kind]
  config = json.loads((parity.golden / 'keys' / f'kl_vae_{kind}.config.json').read_text())
  sizes = kl_vae.sizes(config)
  tensor_map, source, ours = parity.match_published(NAME, f'kl_vae_{kind}', sizes)
  assert source == ours == total and not tensor_map.ignored and not tensor_map.absent
  assert sizes.channels == channels and sizes.body.factor == 8
  assert kl_vae.sizes(kl_vae.config_json(sizes)) == sizes


@pytest.mark.parametrize(
  'change, words',
  [
    ({'act_fn': 'gelu'}, 'act_fn'),
    ({'latents_mean': [0.0]}, 'latents_mean'),
    ({'down_block_types': ['AttnDownEncoderBlock2D']}, 'down_block_types'),
  ],
)
def test_unsupported_configs_are_refused(change, words):
  with pytest.raises(UserError, match=words):
    kl_vae.sizes({**KINDS['flux'], **change})
