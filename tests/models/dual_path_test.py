"""The dual path: logical axes for encoders of every kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vpe_jax import sharding
from vpe_jax.config import MeshConfig
from vpe_jax.models.dual_path import DualPath, DualPathConfig
from vpe_jax.models.unified import LOGICAL_AXES
from vpe_jax.models.vit import EncoderConfig


@pytest.mark.parametrize('activation', ['gelu_tanh', 'swiglu'])
@pytest.mark.parametrize('layer_scale', [False, True])
def test_each_parameter_of_each_encoder_has_logical_axes(activation, layer_scale):
  encoder = EncoderConfig(32, 2, 2, 48, activation=activation, layer_scale=layer_scale)
  path = DualPath(DualPathConfig(encoder, 4), 16, 2, jnp.float32)
  params = jax.eval_shape(path.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  mesh = sharding.make_mesh(MeshConfig())
  tree = {'dit': {'dual_path': params}}
  shardings = sharding.param_shardings(tree, LOGICAL_AXES, mesh, 'fsdp')
  assert jax.tree.structure(shardings) == jax.tree.structure(tree)
