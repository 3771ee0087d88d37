"""LlamaGen's VQ and Emu3.5's IBQ: what the released code gives, and tensors back again."""

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
REAL = {'llamagen_vq': (71_883_403, 65_536), 'ibq': (455_336_963, 0)}  # ours, and a buffer
CHANGES = {
  'llamagen_vq': [
    ({'codebook_l2_norm': False}, 'codebook_l2_norm'),
    ({'ch_mult': [2]}, 'ch_mult'),
    ({'decoder_ch_mult': [1]}, 'decoder_ch_mult'),
    ({'ch': 40}, '40 channels'),
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
  """Inputs and outputs, channels last."""
  io = dict(np.load(parity.golden / GOLDEN[name] / 'io.npz'))
  moved = {key: np.moveaxis(leaf, 1, -1) if leaf.ndim == 4 else leaf for key, leaf in io.items()}
  return {**moved, 'indices': io['indices'].reshape(moved['quant'].shape[:3]).astype(np.int32)}


@pytest.fixture(scope='module')
def run(imported, golden):
  """params -> features of the golden pictures, their codes, and the golden codes' picture."""
  network = VqGan(imported.sizes)

  def forward(params):
    apply = lambda inputs, method: network.apply({'params': params}, inputs, method=method)
    features = apply(golden['image'], 'features')
    codes = codebook.nearest(features, params['codebook'], imported.sizes.normed)
    lookup, picture = (apply(golden['indices'], method) for method in ('lookup', 'decode'))
    return {'pre_quant': features, 'indices': codes, 'quant': lookup, 'recon': picture}

  return jax.jit(forward)


def test_outputs_equal_the_released_code(parity, imported, golden, run):
  ours = run(imported.params)
  np.testing.assert_array_equal(ours['indices'], golden['indices'])
  assert len(np.unique(golden['indices'])) > 20
  for key in golden.keys() & {'pre_quant', 'quant', 'recon'}:
    parity.close(ours[key], golden[key])


def test_codes_equal_the_released_code_on_drawings_and_noise(parity, name, imported, golden):
  wanted = np.load(parity.golden / GOLDEN[name] / 'codes.npz')['codes']
  side = golden['image'].shape[1]
  codec, params = VqGanCodec(imported.sizes, side), {'tokens': imported.params}
  codes = jax.jit(codec.encode)(params, parity.renders(len(wanted) // 2, side))
  np.testing.assert_array_equal(codes.reshape(wanted.shape), wanted)
  assert len(wanted) == 64 and len(np.unique(wanted)) > 60


def test_codec_gives_codes_and_pictures(parity, imported, golden):
  side = golden['image'].shape[1]
  codec, params = VqGanCodec(imported.sizes, side), {'tokens': imported.params}
  codes = jax.jit(codec.encode)(params, 0.5 * golden['image'] + 0.5)
  np.testing.assert_array_equal(codes, golden['indices'].reshape(len(codes), -1))
  wanted = np.clip(0.5 * golden['recon'] + 0.5, 0.0, 1.0)
  parity.close(jax.jit(codec.decode)(params, codes), wanted)
  assert codec.grid**2 == codes.shape[1] and codec.codes == len(imported.params['codebook'])


def test_round_trip_is_exact(parity, name, imported, tmp_path):
  parity.trip(name, parity.golden / GOLDEN[name], imported, tmp_path / 'out')
  again = parity.load(name, tmp_path / 'out')
  assert again.sizes == imported.sizes
  jax.tree.map(np.testing.assert_array_equal, again.params, imported.params)


def test_pickled_weights_give_the_same_network(parity, name, imported, tmp_path):
  """The published files are pickles, LlamaGen's with its weights one level down."""
  import torch

  source = sources.open_source(str(parity.golden / GOLDEN[name])).tensors
  tensors = {key: torch.tensor(np.array(leaf.read())) for key, leaf in source.items()}
  torch.save({'model': tensors, 'steps': 3} if name == 'llamagen_vq' else tensors,
             tmp_path / 'weights.pt')  # fmt: skip
  shutil.copy(parity.golden / GOLDEN[name] / 'config.json', tmp_path)
  again = parity.load(name, tmp_path / 'weights.pt')
  jax.tree.map(np.testing.assert_array_equal, again.params, imported.params)


def test_every_bias_and_norm_matters(parity, imported, golden, run):
  apply = lambda p: np.concatenate([np.ravel(run(p)[key]) for key in ('pre_quant', 'recon')])
  # A key's bias shifts all logits of a query alike, which softmax doesn't see.
  unnoticed = {p for p in parity.mutants(imported.params, apply) if not p.endswith('/k/bias')}
  # The golden networks have 32 channels at the pictures' resolution, each a group of its own: the
  # norms that follow take constants off again. (The test of kl_vae has wider groups.)
  finest = f'decoder/level_{0 if imported.sizes.body.fine_first else 1}'
  decoder = {f'{finest}/block_{i}/conv_{j}/bias' for i in (0, 1) for j in (1, 2)}
  shortcut = f'{finest}/block_0/shortcut/bias'
  assert unnoticed == decoder | {shortcut, 'encoder/level_0/block_0/conv_1/bias'}
  body = dataclasses.replace(imported.sizes.body, groups=16)
  network = VqGan(dataclasses.replace(imported.sizes, body=body))
  decode = jax.jit(lambda p: network.apply({'params': p}, golden['indices'], method='decode'))
  assert np.max(np.abs(decode(imported.params) - golden['recon'])) > 1e-3


def test_only_llamagen_compares_directions(name, imported, golden, run):
  rows = imported.params['codebook']
  scale = 0.5 + np.random.default_rng(0).random((len(rows), 1), np.float32)
  codes = run({**imported.params, 'codebook': rows * scale})['indices']
  assert np.array_equal(codes, golden['indices']) == (name == 'llamagen_vq')


def test_real_size(parity, name):
  family = families.get(name)
  plan, source, ours = parity.real(name, name, family.BARE)
  assert (ours, source - ours) == REAL[name] and not plan.absent
  assert set(plan.ignored) == ({'quantize.codebook_used'} if name == 'llamagen_vq' else set())
  assert family.BARE.body.factor == 16
  assert family.sizes(family.published(family.BARE)) == family.BARE


def test_other_networks_are_refused(name, imported):
  family = families.get(name)
  for change, words in CHANGES[name]:
    with pytest.raises(UserError, match=words):
      family.sizes({**family.published(imported.sizes), **change})


def test_sections_of_the_published_yaml_are_read():
  family = families.get('ibq')
  flat = family.published(family.BARE)
  outside = {field: flat.pop(field) for field in ('n_embed', 'embed_dim')}
  assert family.sizes({**outside, 'ddconfig': flat}) == family.BARE


def test_the_codec_names_the_network_and_its_shapes(imported):
  codec = VqGanCodec(imported.sizes, name='tokens')
  shapes = jax.tree.map(lambda leaf: leaf.shape, codec.abstract_params())
  assert shapes == {'tokens': jax.tree.map(lambda leaf: leaf.shape, dict(imported.params))}
