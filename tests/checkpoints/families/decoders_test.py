"""Qwen2 and Llama as transformers saves them: numbers, gradients, and tensors back again."""

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

pytestmark = pytest.mark.parity
LENGTH = (14, 9)
# The stretch bends within this many positions.
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


def _model(parity, case: str):
  """A small reference model, redrawn."""
  import transformers

  name, *tied = case.split()
  kind, config = {
    'qwen2': (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
    'llama': (transformers.LlamaForCausalLM, transformers.LlamaConfig),
  }[name]
  given = {
    'vocab_size': 40,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e3},
    'tie_word_embeddings': bool(tied),
    'bos_token_id': 1,
    'eos_token_id': 2,
  }
  return parity.redraw(kind(config(**given | CASES[case])))


@functools.cache
def _compiled(sizes):
  """Logits and gradients for one set of sizes."""

  def total(params, ids, weights):
    logits = Decoder(sizes).__call__(params, ids, jnp.asarray(LENGTH))
    return jnp.sum(logits * weights), logits

  return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.fixture(scope='module', params=('qwen2 tied', 'llama'))
def case(parity, request, tmp_path_factory):
  """Name of the family, reference model, folder it was saved to, and what we imported."""
  model = _model(parity, request.param)
  folder = tmp_path_factory.mktemp('decoder')
  model.save_pretrained(folder)
  name = request.param.split()[0]
  return name, model, folder, parity.load(name, folder)


@pytest.fixture(scope='module')
def inputs():
  """Ids, and weights of the logits: 0 for those of padding."""
  draw = np.random.default_rng(0)
  ids = draw.integers(0, 40, (2, max(LENGTH))).astype(np.int32)
  weights = draw.standard_normal((2, max(LENGTH), 40)).astype(np.float32)
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
  parity.close(np.asarray(ours)[real], theirs.detach().numpy()[real])
  model.zero_grad()
  (theirs * theirs.new_tensor(weights)).sum().backward()
  parity.gradients(name, imported.sizes, gradients, model, tmp_path / 'gradients')


def test_round_trip_is_exact_and_transformers_opens_it(parity, case, inputs, tmp_path):
  name, model, folder, imported = case
  parity.trip(name, folder, imported, tmp_path / 'out')
  opened, found = type(model).from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not found['missing_keys'] and not found['unexpected_keys']
  wanted = _reference(model, inputs[0], inputs[2]).detach().numpy()
  parity.close(_reference(opened, inputs[0], inputs[2]).detach().numpy(), wanted, 1e-6)


def test_every_bias_norm_and_rotation_matters(parity, case, inputs):
  _, _, _, imported = case
  ids, weights, real = inputs
  run = lambda params, sizes: np.asarray(_compiled(sizes)(params, ids, weights)[0][1])[real]
  assert not parity.mutants(imported.params, lambda params: run(params, imported.sizes))
  wanted, body = run(imported.params, imported.sizes), imported.sizes.body
  other = {'rope_scaling': None} if body.rope_scaling else {'rope_theta': 1e4}
  changed = dataclasses.replace(body, **other)
  found = run(imported.params, dataclasses.replace(imported.sizes, body=changed))
  assert np.max(np.abs(found - wanted)) > 1e-3 * np.max(np.abs(wanted))


@pytest.mark.parametrize('which', ['qwen2', 'llama tied'])
def test_the_other_kind_of_output(parity, which, tmp_path):
  model, (name, *tied) = _model(parity, which), which.split()
  model.save_pretrained(tmp_path / 'in')
  imported = parity.load(name, tmp_path / 'in')
  assert imported.sizes.tied == ('head' not in imported.params) == bool(tied)
  parity.trip(name, tmp_path / 'in', imported, tmp_path / 'out')
  hidden = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
  ours = Decoder(imported.sizes).logits(imported.params, hidden)
  theirs = model.lm_head(model.lm_head.weight.new_tensor(hidden))
  parity.close(ours, theirs.detach().numpy())


def test_an_earlier_config_says_the_same(case):
  """transformers up to 4 wrote rope_theta and rope_scaling, and no head_dim for Qwen2."""
  name, model, folder, imported = case
  said = json.loads((folder / 'config.json').read_text())
  assert 'rope_theta' not in said
  rope = said.pop('rope_parameters')
  said['rope_theta'] = rope.pop('rope_theta')
  said['rope_scaling'] = rope if rope['rope_type'] != 'default' else None
  assert families.get(name).sizes(said) == imported.sizes


@pytest.mark.parametrize(
  ('name', 'field', 'words'),
  [
    ('qwen2', {'use_sliding_window': True}, 'whole text'),
    ('qwen2', {'hidden_act': 'gelu'}, "use 'gelu'"),
    ('qwen2', {'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "'yarn'"),
    ('llama', {'attention_bias': True}, 'attention_bias'),
    ('llama', {'mlp_bias': True}, 'mlp_bias'),
  ],
)
def test_what_ours_cannot_express_is_refused(parity, name, field, words):
  said = parity.published('qwen2_0.5b')[0] | field
  with pytest.raises(UserError, match=words):
    families.get(name).sizes(said)


@pytest.mark.parametrize(
  ('real', 'body', 'total'),
  [
    ('qwen2_0.5b', 357_898_112, 494_032_768),
    ('qwen2_1.5b', 1_310_340_608, 1_543_714_304),
    ('qwen2_7b', 6_525_621_760, 7_615_616_512),
    ('llama_1b', 973_146_112, 1_235_814_400),
    ('llama_8b', 6_979_588_096, 8_030_261_248),
  ],
)
def test_real_sizes(parity, real, body, total):
  said, tensors = parity.published(real)
  family = families.get(real.split('_')[0])
  sizes = family.sizes(said)
  abstract = jax.eval_shape(lambda key: family.init(sizes, key), jax.random.key(0))
  plan = convert.plan(tensors, family.LAYOUTS, abstract)
  assert plan.places.keys() == tensors.keys() and not plan.absent
  assert parity.count(abstract, r'(layers|norm)/') == body
  assert parity.count(abstract) == total
  assert family.sizes(family.published(sizes)) == sizes
