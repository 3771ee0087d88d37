"""LlamaGen with prefix codes: causality, vocabularies and their blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_systems import redrawn
from vpe_jax.contracts import UserError
from vpe_jax.models.llamagen import LlamaGen, LlamaGenConfig
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.ops.rope import RopeScaling

BODY = TransformerConfig(16, 24, 2, 2, 2, 8, rope_theta=1e4, qkv_bias=False, rope_adjacent=True)
SIZES = LlamaGenConfig(3, 7, 3, BODY, 'identity', prefix_codes=5, prefix_side=2)
MODEL = LlamaGen(SIZES)


@pytest.fixture(scope='module')
def params():
  return redrawn(jax.jit(MODEL.init)(jax.random.key(0)), 0.3)


@pytest.fixture(scope='module')
def run(params):
  return jax.jit(lambda *inputs: MODEL(params, *inputs))


INPUTS = (jnp.array([1, 2]), jnp.arange(18).reshape(2, 9) % 7, jnp.arange(8).reshape(2, 4) % 5)


def test_logits_predict_the_next_code_and_are_causal(run):
  """Changing index n (class 0, prefix 1 to 4, image 5 to 13) changes only logits from n on."""
  before = run(*INPUTS)
  assert before.shape == (2, 13, 12)
  classes, codes, prefix = INPUTS
  changes = {
    0: (classes + 1) % 3,
    2: prefix.at[:, 1].add(1) % 5,
    7: codes.at[:, 2].add(1) % 7,
  }
  for index, change in changes.items():
    inputs = [change if index == n else x for n, x in zip((0, 7, 2), INPUTS, strict=True)]
    changed = np.abs(run(*inputs) - before).max((0, 2)) > 1e-6
    assert not changed[:index].any() and changed[index:].all(), index
  # The last code is never fed.
  last = run(classes, codes.at[:, -1].add(1) % 7, prefix)
  np.testing.assert_array_equal(last, before)


def test_a_masked_code_becomes_the_pad_embedding(params, run):
  masked = jnp.zeros((2, 4), bool).at[0, 2].set(True)
  tokens = MODEL.embed_prefix(params, INPUTS[2], masked)
  np.testing.assert_array_equal(tokens[0, 2], params['embed']['pad'][0])
  np.testing.assert_array_equal(tokens[1], MODEL.embed_prefix(params, INPUTS[2])[1])
  plain, masked_logits = run(*INPUTS), run(*INPUTS, masked)
  assert np.abs(plain - masked_logits)[0, 3:].max() > 1e-3
  np.testing.assert_allclose(plain[1], masked_logits[1], atol=1e-6)


def test_blocks_are_parts_of_the_joint_vocabulary(params):
  hidden = jax.random.normal(jax.random.key(2), (2, 3, 16))
  whole = MODEL.logits(params, hidden)
  np.testing.assert_allclose(MODEL.logits(params, hidden, 'codes'), whole[..., :7], atol=1e-6)
  np.testing.assert_allclose(MODEL.logits(params, hidden, 'prefix'), whole[..., 7:], atol=1e-6)
  with pytest.raises(KeyError, match='plan'):
    MODEL.logits(params, hidden, 'plan')


@pytest.mark.parametrize(
  'change, message',
  [
    ({'class_rotation': 'half'}, "'model.class_rotation' is 'half'"),
    ({'positions': 'circle'}, "'model.positions' is 'circle'"),
    ({'prefix_codes': 5}, "'prefix_side' is 0"),
    ({'body': dataclasses.replace(BODY, head_width=6)}, "'model.body.head_width' is 6"),
    ({'body': dataclasses.replace(BODY, rope_scaling=RopeScaling())}, 'model.body.rope_scaling'),
  ],
)
def test_mistakes_are_named(change, message):
  with pytest.raises(UserError, match=message):
    LlamaGenConfig(**{'classes': 3, 'codes': 7, 'side': 3, 'body': BODY} | change)


def test_positions_along_a_line_take_any_even_head_width():
  body = dataclasses.replace(BODY, head_width=6)
  model = LlamaGen(LlamaGenConfig(3, 7, 3, body, positions='line'))
  logits = jax.eval_shape(lambda: model(model.init(jax.random.key(0)), *INPUTS[:2]))
  assert logits.shape == (2, 9, 7)
