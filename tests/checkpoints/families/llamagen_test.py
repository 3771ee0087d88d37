"""Tests of LlamaGen's GPT against golden logits of the original, and of exact round trips."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.checkpoints import convert, families, sources
from vpe_jax.checkpoints.families import llamagen
from vpe_jax.contracts import UserError
from vpe_jax.models import mot
from vpe_jax.models.llamagen import LlamaGen
from vpe_jax.sharding import leaves_by_path

pytestmark = pytest.mark.parity
NAME = 'llamagen'
GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'llamagen_gpt'


@pytest.fixture(scope='module')
def imported(parity):
  return parity.load(NAME, GOLDEN)


@pytest.fixture(scope='module')
def golden():
  """Classes (one is the null class), codes, and the original's logits."""
  return dict(np.load(GOLDEN / 'io.npz'))


@functools.cache
def _compiled(sizes):
  return jax.jit(LlamaGen(sizes))


def _logits(sizes, params, golden):
  return np.asarray(_compiled(sizes)(params, golden['classes'], golden['idx']))


def test_logits_equal_the_original(parity, imported, golden):
  parity.assert_close(_logits(imported.sizes, imported.params, golden), golden['logits'])


def test_round_trip_is_exact(parity, imported, tmp_path):
  parity.check_round_trip(NAME, GOLDEN, imported, tmp_path / 'out')
  reloaded = sources.open_source(str(tmp_path / 'out'))
  assert set(reloaded.tensors) == set(sources.open_source(str(GOLDEN)).tensors)
  assert llamagen.sizes(reloaded.config) == imported.sizes


def test_pickled_release_is_imported(imported, tmp_path):
  import safetensors.torch
  import torch

  weights = safetensors.torch.load_file(GOLDEN / 'model.safetensors')
  torch.save({'model': weights}, tmp_path / 'c2i_XL_384.pt')
  source = sources.open_source(str(tmp_path / 'c2i_XL_384.pt'))
  loaded = leaves_by_path(families.load(NAME, source, sizes=imported.sizes).params)
  for path, leaf in leaves_by_path(imported.params).items():
    np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def test_every_norm_and_rope_setting_matters(parity, imported, golden):
  run = functools.partial(_logits, golden=golden)
  assert not parity.insensitive(imported.params, functools.partial(run, imported.sizes))
  body = imported.sizes.body
  for change in (
    {'class_rotation': 'identity'},
    {'body': dataclasses.replace(body, rope_theta=100.0)},
    {'body': dataclasses.replace(body, rope_adjacent=False)},
    {'side': 16},
  ):
    changed = run(dataclasses.replace(imported.sizes, **change), imported.params)
    error = np.max(np.abs(changed - golden['logits'])) / np.max(np.abs(golden['logits']))
    assert error > 1e-3, f'{change} does not change the logits: {error:.2e}'


def test_unsupported_configs_are_refused():
  config = json.loads((GOLDEN / 'config.json').read_text())
  with pytest.raises(UserError, match='t2i'):
    llamagen.sizes(config | {'model_type': 't2i', 'cls_token_num': 120})
  with pytest.raises(UserError, match='square'):
    llamagen.sizes(config | {'block_size': 17})
  with pytest.raises(UserError, match='class_rotation'):
    llamagen.sizes(config | {'class_rotation': 'none'})
  with pytest.raises(UserError, match='head width is 6'):
    llamagen.sizes(config | {'n_head': 16})
  with pytest.raises(KeyError, match='n_layer'):
    llamagen.sizes({key: config[key] for key in config if key != 'n_layer'})


@pytest.mark.parametrize(
  ('published', 'body', 'total'),
  [
    ('llamagen_b', 84_953_856, 110_888_448),
    ('llamagen_l', 308_331_520, 342_910_976),
    ('llamagen_xl', 731_475_200, 774_699_520),
    ('llamagen_xxl', 1_359_103_488, 1_410_972_672),
  ],
)
def test_published_sizes(parity, published, body, total):
  config, tensors = parity.load_published(published)
  sizes = llamagen.sizes(config)
  abstract = jax.eval_shape(lambda key: llamagen.init(sizes, key), jax.random.key(0))
  tensor_map = convert.match_tensors(tensors, llamagen.LAYOUTS, abstract)
  assert tensor_map.destinations.keys() == tensors.keys() and not tensor_map.absent
  assert parity.count(abstract, r'(layers|norm)/') == body
  assert parity.count(abstract) == total
  assert llamagen.sizes(llamagen.config_json(sizes)) == sizes
  # In the hub's copies, the MLP width follows from the model width.
  arguments = {'multiple_of': 256, 'ffn_dim_multiplier': None, 'n_kv_head': None}
  hub = {key: config[key] for key in config if key not in ('ffn_hidden', 'model_type')}
  assert llamagen.sizes(hub | arguments | {'model_type': 'c2i', 'cls_token_num': 1}) == sizes


def test_cached_decoding_equals_the_full_sequence(parity, imported, golden):
  model, params = LlamaGen(imported.sizes), imported.params
  params = {**params, 'layers': mot.unstack(params['layers'])}
  stream = model.stream(jnp.zeros((2, 16, imported.sizes.body.width)))
  cache = mot.empty_cache(model.layer, params['layers'], stream.visibility, jnp.float32)

  @jax.jit
  def step(x, cache, at):
    return model.run(params, model.stream(x, at), cache, at)

  x, steps = model.embed_classes(params, jnp.asarray(golden['classes'])), []
  for at in range(16):
    logits, cache = step(x, cache, at)
    steps.append(logits)
    x = model.embed_codes(params, jnp.asarray(golden['idx'][:, at : at + 1]))
  parity.assert_close(np.concatenate(steps, axis=1), golden['logits'])
