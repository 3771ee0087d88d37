"""The language model: padding, cached decoding, attention, gradients.

Equality with transformers: tests/checkpoints/families.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.models import mot
from vpe_jax.models.decoder import Decoder, DecoderConfig
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import causal_text

BODY = TransformerConfig(width=16, mlp=24, layers=2, heads=4, kv_heads=2, head_width=8)
IDS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 0, 0]])
LENGTH = jnp.array([6, 4])


@pytest.fixture(scope='module')
def model():
  """A model and its parameters, output not tied."""
  model = Decoder(DecoderConfig(vocabulary=10, body=BODY, tied=False, context=6))
  return model, model.init(jax.random.key(0))


def test_padding_changes_nothing(model):
  model, params = model
  run = jax.jit(model)
  expected, output = run(params, IDS, LENGTH), run(params, IDS.at[1, 4:].set(6), LENGTH)
  np.testing.assert_array_equal(expected[0], output[0])
  np.testing.assert_array_equal(expected[1, :4], output[1, :4])
  longer = run(params, IDS.at[1, 4:].set(6), jnp.array([6, 6]))
  assert np.max(np.abs(longer[1, 4:] - output[1, 4:])) > 1e-3


def test_one_token_at_a_time_gives_the_same_hidden_states(model):
  model, params = model
  expected = model.hidden(params, IDS, LENGTH)
  text = build(causal_text(IDS.shape[1]), lengths={'text': LENGTH})['text']
  positions, visibility = text.positions, text.visibility
  layers = mot.unstack(params['layers'])
  cache, output = mot.empty_cache(model.layer, layers, visibility, jnp.float32), []

  @jax.jit
  def step(cache, at):
    one = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, 1, 1)
    x = model.embed(params, one(IDS))
    stream = mot.Stream(x, one(positions), jax.tree.map(one, visibility))
    return model.states({**params, 'layers': layers}, stream, cache, at)

  for at in range(IDS.shape[1]):
    hidden, cache = step(cache, at)
    output.append(hidden)
  output = jnp.concatenate(output, axis=1)
  np.testing.assert_allclose(output[0], expected[0], atol=1e-5)
  np.testing.assert_allclose(output[1, :4], expected[1, :4], atol=1e-5)


def test_a_named_attention_runs_on_sequences_and_not_in_decoding():
  config = DecoderConfig(vocabulary=10, body=BODY, tied=False, context=40)
  params = Decoder(config).init(jax.random.key(0))
  ids = jax.random.randint(jax.random.key(1), (2, 20), 0, 10)
  call = lambda model, ids: jax.jit(model)(params, ids, jnp.array([ids.shape[1]] * 2))
  chunked = Decoder(config, attention='chunked')
  np.testing.assert_allclose(call(chunked, ids), call(Decoder(config), ids), atol=2e-5)
  elsewhere = Decoder(config, attention='pallas_tpu')
  with pytest.raises(UserError, match='runs on tpu'):
    call(elsewhere, ids)
  # For a few tokens, as in decoding, the name is ignored.
  assert np.isfinite(call(elsewhere, ids[:, :4])).all()


def test_unstacked_layers_have_the_gradient_of_stacked_ones(model):
  model, params = model

  def loss(params, unstacked):
    layers = mot.unstack(params['layers']) if unstacked else params['layers']
    return jnp.sum(jnp.sin(model.hidden({**params, 'layers': layers}, IDS, LENGTH)))

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  expected, output = gradient(params, False), gradient(params, True)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), output, expected
  )
  # No layer's gradient is padded with zeros to the size of the stack.
  text = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, True))
  assert 'pad[' not in text and 'dynamic_update_slice' not in text
