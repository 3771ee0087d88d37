"""Tests of Qwen2 and Llama against transformers: outputs, gradients and exact round trips."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.checkpoints import convert, families
from vpe_jax.contracts import UserError
from vpe_jax.models.decoder import Decoder
from vpe_jax.models.taps import Taps

pytestmark = pytest.mark.parity
LENGTH = (14, 9)
# RoPE scaling that takes effect within these few positions.
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 100.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
CASES = {
  'qwen2 tied': {},
  'llama': {'rope_parameters': LLAMA3, 'head_dim': 12, 'rms_norm_eps': 1e-5},
  'qwen2': {},
  'llama tied': {'rope_parameters': LLAMA3},
}


def _model(parity, case: str, layers: int = 2):
  """A small reference model with random parameters."""
  import transformers

  name, *tied = case.split()
  kind, config = {
    'qwen2': (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
    'llama': (transformers.LlamaForCausalLM, transformers.LlamaConfig),
  }[name]
  base = {
    'vocab_size': 40,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': layers,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e3},
    'tie_word_embeddings': bool(tied),
    'bos_token_id': 1,
    'eos_token_id': 2,
  }
  return parity.randomize(kind(config(**base | CASES[case])))


@functools.cache
def _compiled(sizes):
  """Jitted gradients of the logits weighted by `weights`; also the logits."""

  def total(params, ids, weights):
    logits = Decoder(sizes).__call__(params, ids, jnp.asarray(LENGTH))
    return jnp.sum(logits * weights), logits

  return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.fixture(scope='module', params=('qwen2 tied', 'llama'))
def case(parity, request, tmp_path_factory):
  """Name of the family, reference model, its folder, and the imported network."""
  model = _model(parity, request.param)
  folder = tmp_path_factory.mktemp('decoder')
  model.save_pretrained(folder)
  name = request.param.split()[0]
  return name, model, folder, parity.load(name, folder)


@pytest.fixture(scope='module')
def inputs():
  """Token ids, weights of the logits (0 for padding), and the mask of real tokens."""
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 40, (2, max(LENGTH))).astype(np.int32)
  weights = rng.standard_normal((2, max(LENGTH), 40)).astype(np.float32)
  real = np.arange(max(LENGTH)) < np.asarray(LENGTH)[:, None]
  return ids, weights * real[..., None], real


def _reference(model, ids, real):
  import torch

  return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(real)).logits


def test_logits_and_gradients_equal_transformers(parity, case, inputs, tmp_path):
  name, model, _, imported = case
  ids, weights, real = inputs
  theirs = _reference(model, ids, real)
  (_, ours), gradients = _compiled(imported.sizes)(imported.params, ids, weights)
  parity.assert_close(np.asarray(ours)[real], theirs.detach().numpy()[real])
  model.zero_grad()
  (theirs * theirs.new_tensor(weights)).sum().backward()
  parity.check_gradients(name, imported.sizes, gradients, model, tmp_path / 'gradients')


def test_round_trip_is_exact_and_transformers_opens_it(parity, case, inputs, tmp_path):
  name, model, folder, imported = case
  parity.check_round_trip(name, folder, imported, tmp_path / 'out')
  reloaded, info = type(model).from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  expected = _reference(model, inputs[0], inputs[2]).detach().numpy()
  parity.assert_close(_reference(reloaded, inputs[0], inputs[2]).detach().numpy(), expected, 1e-6)


def test_every_bias_norm_and_rope_setting_matters(parity, case, inputs):
  _, _, _, imported = case
  ids, weights, real = inputs
  run = lambda params, sizes: np.asarray(_compiled(sizes)(params, ids, weights)[0][1])[real]
  assert not parity.insensitive(imported.params, lambda params: run(params, imported.sizes))
  expected, body = run(imported.params, imported.sizes), imported.sizes.body
  rope = {'rope_scaling': None} if body.rope_scaling else {'rope_theta': 1e4}
  changed = dataclasses.replace(body, **rope)
  outputs = run(imported.params, dataclasses.replace(imported.sizes, body=changed))
  assert np.max(np.abs(outputs - expected)) > 1e-3 * np.max(np.abs(expected))


def test_inner_states_equal_transformers(parity, inputs, tmp_path):
  """Hidden states, keys and values of all layers equal; neighbouring layers' states differ."""
  model, layers = _model(parity, 'qwen2', layers=4), 4
  model.save_pretrained(tmp_path)
  imported = parity.load('qwen2', tmp_path)
  ids, _, real = inputs
  theirs = _inner_states(model, ids, real)
  every = Taps(hidden=tuple(range(layers + 1)), kv=tuple(range(layers)))

  def ours(**options):
    taps = dataclasses.replace(every, **options)
    run = jax.jit(
      lambda params: Decoder(imported.sizes).hidden_tapped(params, ids, jnp.asarray(LENGTH), taps)[
        1
      ]
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:, real], run(imported.params))

  raw, unrotated = ours(), ours(normed=True, rotated=False)
  pairs = {
    'hidden': raw.hidden,
    'normed': unrotated.hidden,
    'keys': raw.k,
    'keys before rotation': unrotated.k,
    'values': raw.v,
  }
  for name, states in pairs.items():
    expected = theirs[name][:, real]
    for state, reference in zip(states, expected, strict=True):
      parity.assert_close(state, reference)
    steps = np.abs(np.diff(expected, axis=0)).reshape(len(expected) - 1, -1)
    assert np.min(np.max(steps, axis=1)) > 0.1 * np.max(np.abs(expected)), name
  assert np.max(np.abs(raw.k - unrotated.k)) > 0.1 * np.max(np.abs(raw.k))


def _inner_states(model, ids, real):
  """Inner states of transformers' model [layers, B, L, ...], by name."""
  import torch

  last, projected = [], []
  model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
  for layer in model.model.layers:
    layer.self_attn.k_proj.register_forward_hook(lambda *call: projected.append(call[-1]))
  with torch.no_grad():
    output = model(
      input_ids=torch.tensor(ids),
      attention_mask=torch.tensor(real),
      use_cache=True,
      output_hidden_states=True,
    )
    hidden = [*output.hidden_states[:-1], last[0]]
    normed = [*(model.model.norm(x) for x in output.hidden_states[:-1]), output.hidden_states[-1]]
  keys, values = (
    [getattr(layer, name) for layer in output.past_key_values.layers] for name in ('keys', 'values')
  )
  heads = lambda leaves: torch.stack(leaves).transpose(2, 3).numpy()
  return {
    'hidden': torch.stack(hidden).numpy(),
    'normed': torch.stack(normed).numpy(),
    'keys': heads(keys),
    'keys before rotation': torch.stack(projected).unflatten(-1, (2, -1)).numpy(),
    'values': heads(values),
  }


@pytest.mark.parametrize('kind', ['qwen2', 'llama tied'])
def test_tied_and_untied_output_heads_equal_transformers(parity, kind, tmp_path):
  model, (name, *tied) = _model(parity, kind), kind.split()
  model.save_pretrained(tmp_path / 'in')
  imported = parity.load(name, tmp_path / 'in')
  assert imported.sizes.tied == ('head' not in imported.params) == bool(tied)
  parity.check_round_trip(name, tmp_path / 'in', imported, tmp_path / 'out')
  hidden = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
  ours = Decoder(imported.sizes).logits(imported.params, hidden)
  theirs = model.lm_head(model.lm_head.weight.new_tensor(hidden))
  parity.assert_close(ours, theirs.detach().numpy())


def test_config_of_an_earlier_transformers_is_read(case):
  """transformers 4 wrote rope_theta and rope_scaling, and no head_dim for Qwen2."""
  name, model, folder, imported = case
  config = json.loads((folder / 'config.json').read_text())
  assert 'rope_theta' not in config
  rope = config.pop('rope_parameters')
  config['rope_theta'] = rope.pop('rope_theta')
  config['rope_scaling'] = rope if rope['rope_type'] != 'default' else None
  assert families.get(name).sizes(config) == imported.sizes


@pytest.mark.parametrize(
  ('name', 'field', 'words'),
  [
    ('qwen2', {'use_sliding_window': True}, 'use_sliding_window'),
    ('qwen2', {'hidden_act': 'gelu'}, 'hidden_act'),
    ('qwen2', {'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "'yarn'"),
    ('llama', {'attention_bias': True}, 'attention_bias'),
    ('llama', {'mlp_bias': True}, 'mlp_bias'),
  ],
)
def test_unsupported_configs_are_refused(parity, name, field, words):
  config = parity.load_published('qwen2_0.5b')[0] | field
  with pytest.raises(UserError, match=words):
    families.get(name).sizes(config)


@pytest.mark.parametrize(
  ('published', 'body', 'total'),
  [
    ('qwen2_0.5b', 357_898_112, 494_032_768),
    ('qwen2_1.5b', 1_310_340_608, 1_543_714_304),
    ('qwen2_7b', 6_525_621_760, 7_615_616_512),
    ('llama_1b', 973_146_112, 1_235_814_400),
    ('llama_8b', 6_979_588_096, 8_030_261_248),
  ],
)
def test_published_sizes(parity, published, body, total):
  config, tensors = parity.load_published(published)
  family = families.get(published.split('_')[0])
  sizes = family.sizes(config)
  abstract = jax.eval_shape(lambda key: family.init(sizes, key), jax.random.key(0))
  tensor_map = convert.match_tensors(tensors, family.LAYOUTS, abstract)
  assert tensor_map.destinations.keys() == tensors.keys() and not tensor_map.absent
  assert parity.count(abstract, r'(layers|norm)/') == body
  assert parity.count(abstract) == total
  assert family.sizes(family.config_json(sizes)) == sizes
