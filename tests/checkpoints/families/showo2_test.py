"""Tests of the import of Show-o2: exact round trips, pickled releases and published sizes."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from vpe_jax.checkpoints import convert, families, sources
from vpe_jax.checkpoints.families import showo2
from vpe_jax.contracts import UserError
from vpe_jax.sharding import leaves_by_path

pytestmark = pytest.mark.parity
NAME = 'showo2'
# config.json of the released 1.5B model for 512 pixels.
RELEASED = {
  '_class_name': 'Showo2Qwen2_5',
  'llm_vocab_size': 151669,
  'llm_model_path': 'Qwen/Qwen2.5-1.5B-Instruct',
  'load_from_showo': True,
  'image_latent_dim': 16,
  'image_latent_height': 32,
  'image_latent_width': 32,
  'patch_size': 2,
  'hidden_size': 1536,
  'clip_latent_dim': 1152,
  'num_diffusion_layers': 10,
  'add_time_embeds': True,
  'add_qk_norm': True,
  'clip_pretrained_model_path': 'google/siglip-so400m-patch14-384',
}
# Equality of outputs with the original on the golden weights: tests/models/unified_test.py.


def test_round_trip_is_exact(parity, show_o2, tmp_path):
  parity.check_round_trip(NAME, show_o2.folder, show_o2.imported, tmp_path / 'out')
  reloaded = sources.open_source(str(tmp_path / 'out'))
  assert set(reloaded.tensors) == set(sources.open_source(str(show_o2.folder)).tensors)
  assert showo2.sizes(reloaded.config) == show_o2.sizes


def _state_dict(folder):
  import safetensors.torch

  return safetensors.torch.load_file(folder / 'model.safetensors')


def test_pickled_release_with_a_tied_output_head(show_o2, tmp_path):
  import torch

  weights = _state_dict(show_o2.folder)
  weights['showo.lm_head.weight'] = weights['showo.model.embed_tokens.weight']
  torch.save(weights, tmp_path / 'pytorch_model.bin')
  (tmp_path / 'config.json').write_text((show_o2.folder / 'config.json').read_text())
  loaded = families.load(NAME, sources.open_source(str(tmp_path)))
  assert list(loaded.tensor_map.ignored) == ['showo.lm_head.weight']
  assert not loaded.tensor_map.absent
  expected = leaves_by_path(show_o2.imported.params)
  for path, leaf in leaves_by_path(loaded.params).items():
    np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_untied_output_head_is_refused(show_o2, tmp_path):
  import torch

  weights = _state_dict(show_o2.folder)
  weights['showo.lm_head.weight'] = weights['showo.model.embed_tokens.weight'] + 1e-3
  torch.save(weights, tmp_path / 'pytorch_model.bin')
  with pytest.raises(UserError, match='should be one tensor'):
    families.load(NAME, sources.open_source(str(tmp_path)), sizes=show_o2.sizes)


def test_import_leaves_embeddings_of_codes_absent(show_o2):
  sizes = dataclasses.replace(show_o2.sizes, codes=5)
  abstract = jax.eval_shape(lambda key: showo2.init(sizes, key), jax.random.key(0))
  loaded = families.load(NAME, sources.open_source(str(show_o2.folder)), sizes=sizes)
  assert leaves_by_path(abstract).keys() - leaves_by_path(loaded.params).keys() == {'embed/codes'}
  assert leaves_by_path(abstract)['embed/codes'].shape == (7, sizes.ar.width)
  assert list(loaded.tensor_map.absent) == ['embed/codes']


def test_unsupported_configs_are_refused(show_o2):
  config = json.loads((show_o2.folder / 'config.json').read_text())
  with pytest.raises(UserError, match='position_table'):
    showo2.sizes(config | {'position_table': 730})
  with pytest.raises(UserError, match='layout=patch'):
    showo2.config_json(dataclasses.replace(show_o2.sizes, layout='patch'))
  with pytest.raises(UserError, match='width 3584'):
    showo2.sizes(RELEASED | {'hidden_size': 3584})
  with pytest.raises(UserError, match='add_time_embeds'):
    showo2.sizes(RELEASED | {'add_time_embeds': False})
  with pytest.raises(UserError, match='32 x 18 tokens'):
    showo2.sizes(RELEASED | {'image_latent_width': 18})
  with pytest.raises(KeyError, match='clip_layers'):
    showo2.sizes({key: config[key] for key in config if key != 'clip_layers'})


def test_every_bias_and_norm_matters(parity, show_o2):
  concatenate = lambda out: np.concatenate([np.ravel(part) for part in out])
  insensitive = parity.insensitive(
    show_o2.params(), lambda params: concatenate(show_o2.run(params))
  )
  encoder = 'dit/dual_path/encoder'
  assert insensitive == [
    # Without RoPE, the bias of k shifts all logits of a query equally, which softmax ignores.
    f'{encoder}/attention/k/bias',
    # These are 1e-6 in the golden weights; siglip_test.py tests the layer with larger ones.
    f'{encoder}/mlp/down/bias',
    f'{encoder}/mlp/up/bias',
  ]


def test_published_sizes(parity):
  config, tensors = parity.load_published('showo2_1.5b')
  sizes = showo2.sizes(config)
  assert showo2.sizes(RELEASED) == showo2.sizes(RELEASED | {'llm_vocab_size': None}) == sizes
  abstract = jax.eval_shape(lambda key: showo2.init(sizes, key), jax.random.key(0))
  tensor_map = convert.match_tensors(tensors, showo2.LAYOUTS, abstract)
  assert (
    tensor_map.destinations.keys() == tensors.keys()
    and not tensor_map.ignored
    and not tensor_map.absent
  )
  assert parity.count(abstract, r'') == 2_830_777_056
  assert parity.count(abstract, r'dit/dual_path/encoder/') == 396_227_104
  assert parity.count(abstract, r'dit/dual_path/ends/fusion') == 6_493_824
  assert parity.count(abstract, r'dit/head/blocks/') == 859_997_440
