"""Dropout: its rate and scale, its keys, and where it acts in LlamaGen's layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_systems import redrawn
from vpe_jax.models import mot
from vpe_jax.models.dropout import Dropout, drop
from vpe_jax.models.llamagen import LlamaGen, LlamaGenConfig
from vpe_jax.models.transformer import TransformerConfig

BODY = TransformerConfig(16, 24, 2, 2, 2, 8, rope_theta=1e4, qkv_bias=False, rope_adjacent=True)
SIZES = LlamaGenConfig(3, 7, 3, BODY, 'identity', prefix_codes=5, prefix_side=2)
KEYS = jax.random.split(jax.random.key(3), 4)
ALL = 1.0 - 1e-6  # so high that none of a few thousand elements remains


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_share_is_zero_and_the_rest_is_scaled_up(dtype):
  x = jnp.ones((4, 64, 32), dtype)
  output = drop(x, 0.2, KEYS, 'mlp')
  assert output.dtype == dtype
  np.testing.assert_array_equal(np.unique(output), [0.0, np.asarray(1.25, dtype)])
  shares = (np.asarray(output, np.float32) == 0).mean((1, 2))
  np.testing.assert_allclose(shares, 0.2, atol=0.03)
  assert float(jnp.mean(output, dtype=jnp.float32)) == pytest.approx(1.0, abs=0.02)


def test_the_mask_depends_on_the_key_and_on_the_use():
  x = jnp.ones((4, 8, 16))
  output = np.asarray(drop(x, 0.5, KEYS, 'mlp'))
  np.testing.assert_array_equal(drop(x[::-1], 0.5, KEYS[::-1], 'mlp')[::-1], output)
  np.testing.assert_array_equal(drop(x[1:2], 0.5, KEYS[1:2], 'mlp'), output[1:2])
  assert (output[0] != output[1]).any()
  assert (np.asarray(drop(x, 0.5, KEYS, 'residual')) != output).any()
  assert drop(x, 0.0, KEYS, 'mlp') is x and drop(x, 0.5, None, 'mlp') is x


def test_each_layer_of_each_sequence_has_its_own_key():
  layer = LlamaGen(SIZES).layer
  data = jax.random.key_data(mot._of_layers(layer, KEYS)).reshape(2 * 4, -1)
  assert len({tuple(key) for key in data.tolist()}) == 2 * 4


@pytest.mark.parametrize(
  'dropout, silent',
  [
    (Dropout(residual=ALL), ('layers', 'o', 'kernel')),
    (Dropout(mlp=ALL), ('layers', 'down', 'kernel')),
    (Dropout(token=ALL), ('embed',)),
  ],
)
def test_each_rate_acts_on_its_own_activations(dropout, silent):
  """Dropping all activations equals a zero output projection there, or a zero embedding table."""
  params = redrawn(jax.jit(LlamaGen(SIZES).init)(jax.random.key(0)), 0.3)
  model = LlamaGen(SIZES, dropout=dropout)

  @jax.jit
  def hidden(params, keys):
    x = model.inputs(
      params, jnp.arange(4) % 3, jnp.arange(36).reshape(4, 9) % 7, jnp.arange(16).reshape(4, 4) % 5
    )
    return model.states(params, model.stream(x, dropout_keys=keys))[0]

  zero = lambda path, leaf: leaf * (tuple(key.key for key in path)[: len(silent)] != silent)
  without = jax.tree_util.tree_map_with_path(zero, params)
  expected = hidden(without, None)
  np.testing.assert_allclose(hidden(params, KEYS), expected, atol=1e-6)
  assert np.abs(hidden(params, None) - expected).max() > 0.1
