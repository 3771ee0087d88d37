"""Tests of LlamaGen's VQ and Emu3.5's IBQ against the released code, and of round trips."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from vpe_jax.checkpoints import families, sources
from vpe_jax.codecs import codebook
from vpe_jax.codecs.vqgan import VqGan, VqGanCodec
from vpe_jax.contracts import UserError

pytestmark = pytest.mark.parity
GOLDEN = {'llamagen_vq': 'llamagen_vq', 'ibq': 'emu35_ibq'}
# Parameters that we have; elements of a buffer that we drop.
PUBLISHED = {'llamagen_vq': (71_883_403, 65_536), 'ibq': (455_336_963, 0)}
CHANGES = {
  'llamagen_vq': [
    ({'codebook_l2_norm': False}, 'codebook_l2_norm'),
    ({'ch_mult': [2]}, 'ch_mult'),
    ({'decoder_ch_mult': [1]}, 'decoder_ch_mult'),
    ({'ch': 40}, 'widths'),
  ],
  'ibq': [({'double_z': True}, 'double_z'), ({'ch_mult': [2]}, 'ch_mult')],
}


@pytest.fixture(scope='module', params=GOLDEN)
def name(request):
  return request.param


@pytest.fixture(scope='module')
def imported(parity, name):
  return parity.load(name, parity.golden / GOLDEN[name])


@pytest.fixture(scope='module')
def golden(parity, name):
  """Golden inputs and outputs, channels last."""
  io = dict(np.load(parity.golden / GOLDEN[name] / 'io.npz'))
  arrays = {key: np.moveaxis(leaf, 1, -1) if leaf.ndim == 4 else leaf for key, leaf in io.items()}
  return {**arrays, 'indices': io['indices'].reshape(arrays['quant'].shape[:3]).astype(np.int32)}


@pytest.fixture(scope='module')
def run(imported, golden):
  """params -> features and codes of the golden images, and the decoded golden codes."""
  network = VqGan(imported.sizes)

  def forward(params):
    apply = lambda inputs, method: network.apply({'params': params}, inputs, method=method)
    features = apply(golden['image'], 'features')
    codes = codebook.largest_product(features, params['codebook'], imported.sizes.normed)
    lookup, image = (apply(golden['indices'], method) for method in ('lookup', 'decode'))
    return {'pre_quant': features, 'indices': codes, 'quant': lookup, 'recon': image}

  return jax.jit(forward)


def test_outputs_equal_the_released_code(parity, imported, golden, run):
  ours = run(imported.params)
  np.testing.assert_array_equal(ours['indices'], golden['indices'])
  assert len(np.unique(golden['indices'])) > 20
  for key in golden.keys() & {'pre_quant', 'quant', 'recon'}:
    parity.assert_close(ours[key], golden[key])


def test_codes_equal_the_released_code_on_emoji_and_noise(parity, name, imported, golden):
  expected = np.load(parity.golden / GOLDEN[name] / 'codes.npz')['codes']
  side = golden['image'].shape[1]
  codec, params = VqGanCodec(imported.sizes, side), {'tokens': imported.params}
  codes = jax.jit(codec.encode)(params, parity.renders(len(expected) // 2, side))
  np.testing.assert_array_equal(codes.reshape(expected.shape), expected)
  assert len(expected) == 64 and len(np.unique(expected)) > 60


def test_codec_encodes_and_decodes(parity, imported, golden):
  side = golden['image'].shape[1]
  codec, params = VqGanCodec(imported.sizes, side), {'tokens': imported.params}
  codes = jax.jit(codec.encode)(params, 0.5 * golden['image'] + 0.5)
  np.testing.assert_array_equal(codes, golden['indices'].reshape(len(codes), -1))
  expected = np.clip(0.5 * golden['recon'] + 0.5, 0.0, 1.0)
  parity.assert_close(jax.jit(codec.decode)(params, codes), expected)
  assert codec.grid**2 == codes.shape[1] and codec.codes == len(imported.params['codebook'])


def test_round_trip_is_exact(parity, name, imported, tmp_path):
  parity.check_round_trip(name, parity.golden / GOLDEN[name], imported, tmp_path / 'out')
  reloaded = parity.load(name, tmp_path / 'out')
  assert reloaded.sizes == imported.sizes
  jax.tree.map(np.testing.assert_array_equal, reloaded.params, imported.params)


def test_pickled_weights_give_the_same_network(parity, name, imported, tmp_path):
  """The published files are pickles; LlamaGen's nests its weights."""
  import torch

  source = sources.open_source(str(parity.golden / GOLDEN[name])).tensors
  tensors = {key: torch.tensor(np.array(leaf.read())) for key, leaf in source.items()}
  torch.save({'model': tensors, 'steps': 3} if name == 'llamagen_vq' else tensors,
             tmp_path / 'weights.pt')  # fmt: skip
  shutil.copy(parity.golden / GOLDEN[name] / 'config.json', tmp_path)
  reloaded = parity.load(name, tmp_path / 'weights.pt')
  jax.tree.map(np.testing.assert_array_equal, reloaded.params, imported.params)


def test_every_bias_and_norm_matters(parity, imported, golden, run):
  apply = lambda p: np.concatenate([np.ravel(run(p)[key]) for key in ('pre_quant', 'recon')])
  # The bias of k shifts all logits of a query equally, which softmax ignores.
  insensitive = {p for p in parity.insensitive(imported.params, apply) if not p.endswith('/k/bias')}
  # The golden networks have 32 channels at full resolution, each a separate norm group, so the next
  # norm removes a constant. (The test of kl_vae has wider groups.)
  finest = f'decoder/level_{0 if imported.sizes.body.fine_first else 1}'
  decoder = {f'{finest}/block_{i}/conv_{j}/bias' for i in (0, 1) for j in (1, 2)}
  shortcut = f'{finest}/block_0/shortcut/bias'
  assert insensitive == decoder | {shortcut, 'encoder/level_0/block_0/conv_1/bias'}
  body = dataclasses.replace(imported.sizes.body, groups=16)
  network = VqGan(dataclasses.replace(imported.sizes, body=body))
  decode = jax.jit(lambda p: network.apply({'params': p}, golden['indices'], method='decode'))
  assert np.max(np.abs(decode(imported.params) - golden['recon'])) > 1e-3


def test_only_llamagen_ignores_the_norm_of_codebook_entries(name, imported, golden, run):
  entries = imported.params['codebook']
  scale = 0.5 + np.random.default_rng(0).random((len(entries), 1), np.float32)
  codes = run({**imported.params, 'codebook': entries * scale})['indices']
  assert np.array_equal(codes, golden['indices']) == (name == 'llamagen_vq')


def test_published_sizes(parity, name):
  family = families.get(name)
  tensor_map, source, ours = parity.match_published(name, name, family.RELEASED_SIZES)
  assert (ours, source - ours) == PUBLISHED[name] and not tensor_map.absent
  assert set(tensor_map.ignored) == ({'quantize.codebook_used'} if name == 'llamagen_vq' else set())
  assert family.RELEASED_SIZES.body.factor == 16
  assert family.sizes(family.config_json(family.RELEASED_SIZES)) == family.RELEASED_SIZES


def test_unsupported_configs_are_refused(name, imported):
  family = families.get(name)
  for change, words in CHANGES[name]:
    with pytest.raises(UserError, match=words):
      family.sizes({**family.config_json(imported.sizes), **change})


def test_sections_of_the_published_config_are_read():
  family = families.get('ibq')
  flat = family.config_json(family.RELEASED_SIZES)
  outside = {field: flat.pop(field) for field in ('n_embed', 'embed_dim')}
  assert family.sizes({**outside, 'ddconfig': flat}) == family.RELEASED_SIZES


def test_codec_gives_abstract_parameters(imported):
  codec = VqGanCodec(imported.sizes, name='tokens')
  shapes = jax.tree.map(lambda leaf: leaf.shape, codec.abstract_params())
  assert shapes == {'tokens': jax.tree.map(lambda leaf: leaf.shape, dict(imported.params))}
