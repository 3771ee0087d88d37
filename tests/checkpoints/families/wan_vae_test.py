"""Tests of Wan 2.1's autoencoder against diffusers on one frame, in both layouts."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vpe_jax.checkpoints import families
from vpe_jax.checkpoints.families import wan_vae
from vpe_jax.codecs.kl_vae import KlVae, KlVaeCodec
from vpe_jax.contracts import UserError

pytestmark = pytest.mark.parity
NAME = 'wan_vae'
MEAN, DEVIATION = [0.3, -0.2, 0.1], [1.5, 0.7, 2.0]
SMALL = {'base_dim': 8, 'z_dim': 3, 'latents_mean': MEAN, 'latents_std': DEVIATION}
TOTAL, USED = 126_892_531, 44_599_603  # published parameters; those used for a still image


@pytest.fixture(scope='module')
def saved(parity, tmp_path_factory):
  """A small reference model with random parameters, and its folder."""
  import diffusers

  model = parity.randomize(diffusers.AutoencoderKLWan(**SMALL))
  folder = tmp_path_factory.mktemp('wan')
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope='module')
def imported(parity, saved):
  return parity.load(NAME, saved[1])


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).random((2, 16, 24, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def run(imported):
  """(params, images in [-1, 1]) -> mean and log-variance of latents, and the decoded image."""
  network = KlVae(imported.sizes)

  def forward(params, images):
    posterior = network.apply({'params': params}, images, method='posterior')
    decoded = network.apply({'params': params}, posterior.mean, method='decode')
    return (*posterior, jnp.clip(decoded, -1.0, 1.0))

  return jax.jit(forward)


def _frame(array):
  """Converts [B, H, W, C] to a video of one frame."""
  import torch

  return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2)[:, :, None]


def _image(tensor):
  return tensor.detach()[:, :, 0].permute(0, 2, 3, 1).numpy()


def _original(key: str) -> str:
  """Converts a key of diffusers to that of Wan2.1_VAE.pth."""
  block = {'norm1': 'residual.0', 'conv1': 'residual.2', 'norm2': 'residual.3',
           'conv2': 'residual.6', 'conv_shortcut': 'shortcut'}  # fmt: skip
  if key.startswith(('quant_conv', 'post_quant_conv')):
    return key.replace('post_quant_conv', 'conv2').replace('quant_conv', 'conv1')
  key = key.replace('.conv_in.', '.conv1.').replace('.norm_out.', '.head.0.')
  key = key.replace('.conv_out.', '.head.2.').replace('.down_blocks.', '.downsamples.')
  key = key.replace('.mid_block.attentions.0.', '.middle.1.')
  key = re.sub(r'\.mid_block\.resnets\.(\d)', lambda m: f'.middle.{2 * int(m[1])}', key)
  key = re.sub(
    r'\.up_blocks\.(\d)\.resnets\.(\d)', lambda m: f'.upsamples.{4 * int(m[1]) + int(m[2])}', key
  )
  key = re.sub(
    r'\.up_blocks\.(\d)\.upsamplers\.0', lambda m: f'.upsamples.{4 * int(m[1]) + 3}', key
  )
  inner = re.fullmatch(r'(.*\.(?:middle|downsamples|upsamples)\.\d+)\.(\w+)\.(.*)', key)
  return f'{inner[1]}.{block[inner[2]]}.{inner[3]}' if inner and inner[2] in block else key


def test_outputs_and_gradients_equal_diffusers(parity, saved, imported, images, run, tmp_path):
  model, signed = saved[0], 2 * images - 1
  pixels = _frame(signed).requires_grad_()
  posterior = model.encode(pixels).latent_dist
  theirs = (posterior.mean, posterior.logvar, model.decode(posterior.mean).sample)
  ours = run(imported.params, signed)
  for part, expected in zip(ours, theirs, strict=True):
    parity.assert_close(part, _image(expected))
  rng = np.random.default_rng(1)
  weights = [rng.standard_normal(part.shape).astype(np.float32) for part in ours]
  total = lambda p, x: sum(jnp.sum(part * weight) for part, weight in zip(run(p, x), weights))
  param_grads, image_grads = jax.jit(jax.grad(total, argnums=(0, 1)))(imported.params, signed)
  model.zero_grad()
  sum((part * _frame(weight)).sum() for part, weight in zip(theirs, weights)).backward()
  parity.assert_close(image_grads, _image(pixels.grad), 1e-4)
  # The reference gradients, imported like weights. Slices in time that we drop have none.
  grads = {k: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
           for k, p in model.named_parameters()}  # fmt: skip
  causal = [g for k, g in grads.items() if g.ndim == 5 and 'time_conv' not in k and g.shape[2] == 3]
  assert len(causal) > 20 and not any(g[:, :, :-1].any() for g in causal)
  assert not any(g.any() for k, g in grads.items() if 'time_conv' in k)
  safetensors.numpy.save_file(grads, tmp_path / 'model.safetensors')
  expected = parity.load(NAME, tmp_path, sizes=imported.sizes).params
  largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))

  def check(path, ours, theirs):
    largest_entry = float(jnp.max(jnp.abs(theirs)))
    error = float(jnp.max(jnp.abs(ours - theirs))) / max(largest_entry, 1e-9)
    # Softmax ignores the bias of k: its gradient is only rounding error.
    assert error < 1e-4 or largest_entry < 1e-6 * largest, f'{path}: {error:.2e}'

  jax.tree_util.tree_map_with_path(check, param_grads, expected)


def test_codec_normalises_each_channel(parity, saved, imported, images):
  import torch

  codec, params = KlVaeCodec(imported.sizes), {'image': imported.params}
  mean, deviation = np.float32(MEAN), np.float32(DEVIATION)
  with torch.no_grad():
    latents = (_image(saved[0].encode(_frame(2 * images - 1)).latent_dist.mean) - mean) / deviation
    decoded = _image(saved[0].decode(_frame(latents * deviation + mean)).sample)
  parity.assert_close(jax.jit(codec.encode)(params, images), latents)
  parity.assert_close(jax.jit(codec.decode)(params, latents), 0.5 * decoded + 0.5)
  assert codec.factor == 8 and codec.channels == 3


def test_both_layouts_give_the_same_network(parity, saved, imported, tmp_path, monkeypatch):
  import torch

  renamed = {_original(key): leaf for key, leaf in saved[0].state_dict().items()}
  assert len(renamed) == len(saved[0].state_dict())
  for key in (
    'conv1.weight',
    'encoder.downsamples.5.time_conv.bias',
    'encoder.head.0.gamma',
    'decoder.middle.1.to_qkv.weight',
    'decoder.upsamples.4.shortcut.bias',
  ):
    assert key in renamed
  torch.save(renamed, tmp_path / 'Wan2.1_VAE.pth')
  monkeypatch.setattr(wan_vae, 'RELEASED_SIZES', imported.sizes)  # without a config.json
  reloaded = parity.load(NAME, tmp_path / 'Wan2.1_VAE.pth')
  assert reloaded.tensor_map.table.name.endswith('(Wan2.1_VAE.pth)')
  jax.tree.map(np.testing.assert_array_equal, reloaded.params, imported.params)


def test_every_bias_and_norm_matters(parity, imported, images, run):
  signed = 2 * images - 1
  apply = lambda params: np.concatenate([np.ravel(part) for part in run(params, signed)])
  # The bias of k shifts all logits of a query equally, which softmax ignores.
  insensitive = [p for p in parity.insensitive(imported.params, apply) if not p.endswith('/k/bias')]
  assert not insensitive


def test_export_is_refused(imported, tmp_path):
  with pytest.raises(UserError, match='import only'):
    families.save(NAME, imported.sizes, imported.params, tmp_path / 'out')


@pytest.mark.parametrize('rename', [lambda key: key, _original], ids=['diffusers', 'original'])
def test_published_sizes(parity, rename, monkeypatch):
  read = json.load
  monkeypatch.setattr(json, 'load', lambda file: {rename(k): v for k, v in read(file).items()})
  tensor_map, source, ours = parity.match_published(NAME, 'wan_vae', wan_vae.RELEASED_SIZES)
  assert (source, ours) == (TOTAL, USED) and not tensor_map.absent
  assert len(tensor_map.ignored) == 8 and all('time_conv' in key for key in tensor_map.ignored)


def test_sizes_come_from_the_config_or_the_family(parity, saved, imported):
  assert parity.load(NAME, saved[1]).sizes == imported.sizes
  assert wan_vae.sizes(wan_vae.config_json(imported.sizes)) == imported.sizes
  assert wan_vae.RELEASED_SIZES.channels == 16 and len(wan_vae.RELEASED_SIZES.shift) == 16
  for change in ({'is_residual': True}, {'patch_size': 2}, {'decoder_base_dim': 16}):
    with pytest.raises(UserError, match=next(iter(change))):
      wan_vae.sizes({**SMALL, **change})
  wrong_sizes = dataclasses.replace(
    imported.sizes, body=dataclasses.replace(imported.sizes.body, groups=8)
  )
  with pytest.raises(UserError, match='body.groups is 0, not 8'):
    parity.load(NAME, saved[1], sizes=wrong_sizes)
