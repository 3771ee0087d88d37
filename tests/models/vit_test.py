"""The encoder's attention: padding, which implementation runs, and no square buffers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax import sharding
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import UserError
from vpe_jax.models import vit
from vpe_jax.models.dual_path import DualPath, DualPathConfig

CONFIG = vit.EncoderConfig(width=32, layers=1, heads=2, mlp=48)


def _layer(length, attention=''):
  layer = vit.Layer(CONFIG, jnp.float32, attention)
  x = jax.random.normal(jax.random.key(0), (2, length, 32))
  return layer, layer.init(jax.random.key(1), x[:, :1]), x


@pytest.mark.parametrize('attention', ['reference', 'chunked'])
def test_padding_changes_nothing(attention):
  layer, params, x = _layer(20, attention)
  exists = jnp.arange(20) < jnp.array([[20], [13]])
  masked = layer.apply(params, x, exists)
  np.testing.assert_allclose(masked[1, :13], layer.apply(params, x[1:, :13])[0], atol=2e-6)
  np.testing.assert_allclose(masked[0], layer.apply(params, x)[0], atol=2e-6)
  # The same mask, dense.
  dense = layer.apply(params, x, jnp.repeat(exists[:, None], 20, 1))
  np.testing.assert_allclose(masked, dense, atol=2e-6)


def test_long_sequences_make_no_square_buffer():
  layer, params, x = _layer(1024)
  gradient = jax.grad(lambda x: jnp.sum(jnp.sin(layer.apply(params, x))))
  assert '1024,1024' not in str(jax.make_jaxpr(gradient)(x))
  dense = vit.Layer(CONFIG, jnp.float32, 'reference')
  gradient = jax.grad(lambda x: jnp.sum(jnp.sin(dense.apply(params, x))))
  assert '1024,1024' in str(jax.make_jaxpr(gradient)(x))


def test_the_dual_path_passes_its_attention_to_the_encoder():
  path = DualPath(DualPathConfig(CONFIG, 4), 16, 2, jnp.float32, attention='pallas_tpu')
  latents = jnp.zeros((1, 8, 8, 3))
  with pytest.raises(UserError, match='runs on tpu, and the devices are cpu'):
    jax.eval_shape(path.init, jax.random.key(0), latents)


def test_several_devices_compile_one_layer_and_give_the_same_output():
  encoder = vit.Encoder(dataclasses.replace(CONFIG, layers=5), jnp.float32)
  x = jax.random.normal(jax.random.key(0), (8, 12, 32))
  variables = encoder.init(jax.random.key(1), x)
  run = lambda variables, x: encoder.apply(variables, x, depth=4)
  unsharded = jax.jit(run)(variables, x)
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    sharded = jax.jit(run).lower(variables, sharding.put_batch(x, mesh))
    assert sharded.as_text().count('stablehlo.while') == 1
    np.testing.assert_allclose(sharded.compile()(variables, x), unsharded, atol=1e-5)
