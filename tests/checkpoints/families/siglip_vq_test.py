"""Tests of SigLIP-VQ against X-Omni's code and transformers' GLM-Image, in all layouts."""

from __future__ import annotations

import dataclasses
import json

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests import small_models
from vpe_jax.checkpoints import families
from vpe_jax.checkpoints.families import siglip_vq as family
from vpe_jax.codecs.siglip_vq import SiglipVq, SiglipVqCodec, SiglipVqConfig, resample
from vpe_jax.contracts import UserError
from vpe_jax.models.vit import EncoderConfig

pytestmark = pytest.mark.parity
NAME = 'siglip_vq'
GRID, SIDE = (3, 5), 64  # patches of images in gradient tests; pixels in others
TOWER, CODEBOOK, POST = 1_159_607_808, 39_849_472, 84_953_088


@pytest.fixture(scope='module')
def saved(parity, tmp_path_factory):
  """A small GLM-Image with language model and random parameters, and its folder."""
  model = parity.randomize(small_models.glm_image())
  folder = tmp_path_factory.mktemp('glm')
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope='module')
def imported(parity, saved):
  return parity.load(NAME, saved[1])


@pytest.fixture(scope='module')
def run(imported):
  """(params, images in [-1, 1], codes) -> features, projected features, decoded codes."""
  network = SiglipVq(imported.sizes)

  def forward(params, images, codes):
    apply = lambda inputs, method: network.apply({'params': params}, inputs, method=method)
    features = apply(images, 'features')
    return features, apply(features, 'project'), apply(codes, 'decode')

  return jax.jit(forward)


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  images = rng.standard_normal((2, GRID[0] * 16, GRID[1] * 16, 3)).astype(np.float32)
  return images, rng.integers(0, small_models.VQ['num_embeddings'], (2, *GRID)).astype(np.int32)


@pytest.fixture(scope='module')
def golden(parity):
  return dict(np.load(parity.golden / 'xomni_siglip_vq' / 'io.npz'))


@pytest.fixture(scope='module')
def xomni(parity, tmp_path_factory):
  """The golden network, imported from two pickles like X-Omni's: tower and codebook."""
  import torch

  source = parity.golden / 'xomni_siglip_vq'
  config = json.loads((source / 'config.json').read_text())
  tensors = safetensors.numpy.load_file(source / 'model.safetensors')
  folder = tmp_path_factory.mktemp('xomni')
  for name in ('visual', 'vqmodel'):
    part = {k.removeprefix(f'{name}.'): v for k, v in tensors.items() if k.startswith(f'{name}.')}
    torch.save({key: torch.tensor(leaf) for key, leaf in part.items()}, folder / f'{name}.pt')
  sizes = SiglipVqConfig(
    encoder=EncoderConfig(
      config['width'], config['depth'], config['heads'], 4 * config['width'], activation='gelu'
    ),
    table=config['position_grid'],
    codes=config['codebook_size'],
    width=config['codebook_dim'],
    post_blocks=config['post_blocks'],
  )
  return parity.load(NAME, folder, sizes=sizes)


def _reference(model, images):
  """Features [B, h, w, D] of GLM-Image's tower for images [B, H, W, 3], and their pixels."""
  import torch

  height, width = images.shape[1] // 16, images.shape[2] // 16
  pixels = torch.tensor(images).requires_grad_()
  order = 'B (h p) (w q) C -> (B h w) (C p q)'
  grid = torch.tensor([[1, height, width]] * len(images))
  outputs = model.model.visual(einops.rearrange(pixels, order, p=16, q=16), grid_thw=grid)
  features = outputs.last_hidden_state.reshape(len(images), height, width, -1)
  return features, pixels


def _point(layer, x):
  """A 1x1 convolution over [B, h, w, D]."""
  return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_outputs_and_gradients_equal_glm_image(parity, saved, imported, run, inputs, tmp_path):
  import torch

  images, codes = inputs
  vq = saved[0].model.vqmodel
  features, pixels = _reference(saved[0], images)
  decoded = _point(vq.post_quant_conv, vq.quantize.embedding(torch.tensor(codes)))
  theirs = (features, _point(vq.quant_conv, features), decoded)
  rng = np.random.default_rng(1)
  weights = [rng.standard_normal(part.shape).astype(np.float32) for part in theirs]

  def total(params, images):
    parts = run(params, images, codes)
    return sum(jnp.sum(part * weight) for part, weight in zip(parts, weights)), parts

  (_, ours), (param_grads, image_grads) = jax.jit(
    jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
  )(imported.params, images)
  for part, expected in zip(ours, theirs, strict=True):
    parity.assert_close(part, expected.detach().numpy())
  saved[0].zero_grad()
  sum((part * torch.tensor(weight)).sum() for part, weight in zip(theirs, weights)).backward()
  parity.assert_close(image_grads, pixels.grad.numpy(), 1e-4)
  parity.check_gradients(NAME, imported.sizes, param_grads, saved[0], tmp_path / 'gradients')


def test_codes_equal_glm_image_on_emoji_and_noise(parity, saved, imported, run):
  import torch

  vq, images = saved[0].model.vqmodel, parity.renders(32, SIDE)
  codec, params = SiglipVqCodec(imported.sizes, SIDE), {NAME: imported.params}
  codes = jax.jit(codec.encode)(params, images)
  signed = (images / 127.5 - 1).astype(np.float32)
  with torch.no_grad():
    features, _ = _reference(saved[0], signed)
    theirs = torch.cat([vq.encode(x[None].permute(0, 3, 1, 2)).image_tokens for x in features])
    projected = _point(vq.quant_conv, features).numpy()
  ours = run(imported.params, signed, codes.reshape(-1, 4, 4))[1]
  error = np.max(np.abs(ours - projected)) / np.max(np.abs(projected))
  parity.check_codes(codes, theirs.numpy(), projected, imported.params['codebook'], error)
  assert codes.shape == (64, codec.grid**2) and len(np.unique(codes)) > 10


def test_outputs_equal_xomni(parity, xomni, golden):
  images, network = np.moveaxis(golden['image'], 1, -1), SiglipVq(xomni.sizes)
  apply = lambda inputs, method: network.apply({'params': xomni.params}, inputs, method=method)
  features = jax.jit(lambda x: apply(x, 'features'))(images)
  parity.assert_close(features.reshape(golden['features'].shape), golden['features'])
  table = resample(xomni.params['position'], *golden['tokens'].shape[1:])
  parity.assert_close(table, golden['pos_embed_resized'][0])
  np.testing.assert_array_equal(apply(features, 'quantize'), golden['tokens'])
  decoded = jax.jit(lambda x: apply(x, 'decode'))(golden['tokens'].astype(np.int32))
  parity.assert_close(decoded, np.moveaxis(golden['decoded'], 1, -1))
  assert xomni.tensor_map.table.name.endswith('(X-Omni)') and xomni.sizes.post_blocks == 2


def test_bfloat16_stays_close_to_float32(parity, imported, run, inputs):
  network = SiglipVq(imported.sizes, jnp.bfloat16)
  bfloat16 = jax.jit(lambda p, x: network.apply({'params': p}, x, method='features'))
  features = bfloat16(imported.params, inputs[0])
  assert features.dtype == jnp.bfloat16
  parity.assert_close(features.astype(jnp.float32), run(imported.params, *inputs)[0], 0.05)


def test_codec_pads_with_white_and_decodes_to_features(parity, xomni):
  codec, params = SiglipVqCodec(xomni.sizes, 48), {NAME: xomni.params}
  crop = parity.renders(1, 48)[:, 12:36]
  square = np.full((2, 48, 48, 3), 255, np.uint8)
  square[:, 12:36] = crop
  encode = jax.jit(codec.encode)
  np.testing.assert_array_equal(encode(params, crop), encode(params, square))
  codes = encode(params, square / np.float32(255))
  np.testing.assert_array_equal(codes, encode(params, square))
  assert codec.decode(params, codes).shape == (2, 9, 64) and codec.codes == 160


def test_round_trips_are_exact_and_glm_image_opens_them(parity, saved, imported, xomni, tmp_path):
  import torch

  parity.check_round_trip(NAME, saved[1], imported, tmp_path / 'out')
  tensors = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  for part in ('visual', 'vqmodel'):
    prefix = f'model.{part}.'
    state = {k.removeprefix(prefix): torch.tensor(v) for k, v in tensors.items() if prefix in k}
    getattr(saved[0].model, part).load_state_dict(state, strict=True)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  vision = saved[0].config.vision_config.to_dict()
  for field in ('depth', 'num_heads', 'hidden_act', 'layer_norm_eps', 'image_size', 'patch_size'):
    assert config['vision_config'][field] == vision[field]
  for original in (imported, xomni):
    folder = tmp_path / str(original.sizes.post_blocks)
    families.save(NAME, original.sizes, original.params, folder)
    reloaded = parity.load(NAME, folder)
    assert reloaded.sizes == original.sizes and reloaded.tensor_map.table.name.endswith(
      '(LLaDA2.0-Uni)'
    )
    jax.tree.map(np.testing.assert_array_equal, reloaded.params, original.params)


def test_every_bias_and_norm_matters(parity, imported, run, inputs, xomni, golden):
  apply = lambda p: np.concatenate([np.ravel(part) for part in run(p, *inputs)])
  # The bias of k shifts all logits of a query equally, which softmax ignores.
  insensitive = [p for p in parity.insensitive(imported.params, apply) if not p.endswith('/k/bias')]
  assert not insensitive
  decode = jax.jit(
    lambda post: SiglipVq(xomni.sizes).apply(
      {'params': {**xomni.params, **post}}, golden['tokens'].astype(np.int32), method='decode'
    )
  )
  post = {name: xomni.params[name] for name in ('post_0', 'post_1', 'post_quant')}
  assert not parity.insensitive(post, decode)
  tanh = dataclasses.replace(imported.sizes.encoder, activation='gelu_tanh')
  network = SiglipVq(dataclasses.replace(imported.sizes, encoder=tanh))
  changed = network.apply({'params': imported.params}, inputs[0], method='features')
  expected = run(imported.params, *inputs)[0]
  assert np.max(np.abs(changed - expected)) / np.max(np.abs(expected)) > 1e-4


@pytest.mark.parametrize('kind', ['xomni', 'glm', 'llada'])
def test_published_sizes(parity, kind):
  sizes = family.RELEASED_SIZES if kind == 'xomni' else SiglipVqConfig()
  tensor_map, source, ours = parity.match_published(NAME, f'siglip_vq_{kind}', sizes)
  assert ours == TOWER + CODEBOOK + (POST if kind == 'xomni' else 0) and not tensor_map.absent
  assert {'xomni': 'X-Omni', 'glm': 'GLM', 'llada': 'LLaDA'}[kind] in tensor_map.table.name
  assert (source == ours) == (kind != 'glm')
  assert all('language_model' in key or 'lm_head' in key for key in tensor_map.ignored)
  assert family.sizes(family.config_json(sizes)) == sizes


def test_configs_of_all_three_releases_are_read():
  assert family.sizes({'vision_config': {}, 'vq_config': {}}) == SiglipVqConfig()
  encoder = {'siglip_name': 'siglip2_giant_patch16_384', 'codebook_size': 16384,
             'codebook_dim': 2048, 'z_channels': 1536}  # fmt: skip
  assert family.sizes({'vision_config': {'encoder': encoder}}) == family.RELEASED_SIZES
  for vision, words in (
    ({'encoder': {**encoder, 'siglip_name': 'other'}}, 'other'),
    ({'hidden_act': 'relu'}, 'relu'),
    ({'attention_bias': False}, 'attention_bias'),
    ({'hidden_size': 64}, 'latent_channels is 1536'),
  ):
    with pytest.raises(UserError, match=words):
      family.sizes({'vision_config': vision, 'vq_config': {}})
