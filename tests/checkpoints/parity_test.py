"""Tests of --check for every family with a reference library."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import small_models
from vpe_jax.checkpoints import families, parity, sources
from vpe_jax.contracts import UserError

pytestmark = pytest.mark.parity
_TOWER = {
  'hidden_size': 16,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'intermediate_size': 24,
}


def _language_model(transformers, name):
  config = getattr(transformers, f'{name}Config')(
    **_TOWER, num_key_value_heads=1, vocab_size=40, max_position_embeddings=32
  )
  return getattr(transformers, f'{name}ForCausalLM')(config)


def _clip(transformers):
  vision = _TOWER | {'image_size': 16, 'patch_size': 8}
  text = _TOWER | {'vocab_size': 40, 'max_position_embeddings': 6, 'eos_token_id': 39}
  config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
  return transformers.CLIPModel(config)


def _dinov2(transformers):
  sizes = {name: size for name, size in _TOWER.items() if name != 'intermediate_size'}
  config = transformers.Dinov2Config(**sizes, image_size=16, patch_size=8, mlp_ratio=2)
  return transformers.Dinov2Model(config)


def _kl_vae(diffusers):
  return diffusers.AutoencoderKL(
    down_block_types=['DownEncoderBlock2D'] * 2,
    up_block_types=['UpDecoderBlock2D'] * 2,
    block_out_channels=[8, 8],
    norm_num_groups=4,
  )


def _wan_vae(diffusers):
  return diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)


_MODELS = {
  'qwen2': ('transformers', lambda library: _language_model(library, 'Qwen2')),
  'llama': ('transformers', lambda library: _language_model(library, 'Llama')),
  'clip': ('transformers', _clip),
  'dinov2': ('transformers', _dinov2),
  'siglip_vq': ('transformers', lambda _: small_models.glm_image()),
  'kl_vae': ('diffusers', _kl_vae),
  'wan_vae': ('diffusers', _wan_vae),
}


@pytest.mark.parametrize('name', _MODELS)
def test_import_matches_its_reference(name, tmp_path):
  package, make = _MODELS[name]
  torch.manual_seed(0)
  make(__import__(package)).save_pretrained(tmp_path)
  imported = families.load(name, sources.open_source(str(tmp_path)))
  errors = parity.compare(imported, tmp_path)
  passed, line = parity.verdict(name, errors)
  assert passed and 'passes' in line
  # Negative control: a changed scale fails the check.
  leaf = next(iter(sorted(_scale_paths(imported.params))))
  _change(imported.params, leaf)
  assert not parity.verdict(name, parity.compare(imported, tmp_path))[0], leaf


def _scale_paths(tree, prefix=()):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _scale_paths(value, (*prefix, key))
    elif key == 'scale':
      yield (*prefix, key)


def _change(tree, path):
  *parents, name = path
  for parent in parents:
    tree = tree[parent]
  tree[name] = tree[name] * 1.5


def test_layout_without_a_reference_is_refused(tmp_path):
  golden = Path(__file__).parents[1] / 'golden' / 'xomni_siglip_vq'
  tensor_map = types.SimpleNamespace(table=types.SimpleNamespace(name='siglip_vq (X-Omni)'))
  with pytest.raises(UserError, match='X-Omni.*without --check'):
    parity.compare(families.Imported('siglip_vq', None, {}, tensor_map), golden)


def test_error_names_a_missing_library(monkeypatch, tmp_path):
  imported = families.Imported('qwen2', None, {}, None)
  monkeypatch.setitem(parity._REFERENCES, 'qwen2', ('no_such_library', None))
  with pytest.raises(UserError, match='pip install no_such_library'):
    parity.compare(imported, tmp_path)


def test_reference_computes_no_gradients_and_a_shape_error_names_the_output(monkeypatch, tmp_path):
  modes = []

  def pairs(library, *_):
    modes.append(library.is_grad_enabled())
    return {'logits': (np.zeros((2, 3)), library.zeros(2, 4))}

  monkeypatch.setitem(parity._REFERENCES, 'qwen2', ('torch', pairs))
  with pytest.raises(UserError, match=r'logits has shape \(2, 3\), .*\(2, 4\)'):
    parity.compare(families.Imported('qwen2', None, {}, None), tmp_path)
  assert modes == [False]
