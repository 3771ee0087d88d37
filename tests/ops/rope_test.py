"""Rotary positions: parity with transformers, and products that depend only on distances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from vpe_jax.ops import rope

WIDTH = 16
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 32.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


@pytest.mark.parity
@pytest.mark.parametrize('scaled', [False, True])
def test_equals_transformers(scaled):
  parameters = {'rope_theta': 5e5, **(LLAMA3 if scaled else {'rope_type': 'default'})}
  config = LlamaConfig(
    hidden_size=2 * WIDTH, num_attention_heads=2, head_dim=WIDTH, rope_parameters=parameters
  )
  positions = np.array([[0, 1, 7, 500, 9000]])
  q = np.random.default_rng(0).standard_normal((1, 5, 2, WIDTH)).astype(np.float32)
  states = torch.from_numpy(q).transpose(1, 2)
  cos, sin = LlamaRotaryEmbedding(config)(states, torch.from_numpy(positions))
  theirs, _ = apply_rotary_pos_emb(states, states, cos, sin)
  scaling = rope.RopeScaling() if scaled else None
  ours = rope.rotate(jnp.asarray(q), rope.rotary(jnp.asarray(positions), WIDTH, 5e5, scaling))
  np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=2e-3)
  near = slice(0, 4)  # float32 angles are exact enough up to some hundred positions
  np.testing.assert_allclose(ours[:, near], theirs.transpose(1, 2).numpy()[:, near], atol=5e-5)


def test_products_depend_only_on_distance():
  x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, WIDTH))
  rotated = lambda z, position: rope.rotate(z, rope.rotary(jnp.array([[position]]), WIDTH, 1e4))
  product = lambda a, b: jnp.sum(rotated(x, a) * rotated(y, b))
  np.testing.assert_allclose(product(3, 8), product(13, 18), rtol=1e-5)
  assert abs(float(product(3, 8) - product(3, 9))) > 1e-4


def test_adjacent_pairs_are_the_halves_in_another_order():
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, WIDTH))
  tables = rope.rotary(jnp.array([[0, 2, 9], [1, 4, 5]]), WIDTH, 1e4)
  interleave = lambda y: y.reshape(2, 3, 2, 2, WIDTH // 2).swapaxes(-1, -2).reshape(x.shape)
  ours = rope.rotate(interleave(x), tables, adjacent=True)
  np.testing.assert_allclose(ours, interleave(rope.rotate(x, tables)), atol=1e-6)


def test_grid_rotates_half_of_the_pairs_by_row_and_half_by_column():
  x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, WIDTH))
  rotated = lambda z, *at: rope.rotate(z, rope.rotary_grid(jnp.array([[at]]), WIDTH, 1e4))
  product = lambda a, b: jnp.sum(rotated(x, *a) * rotated(y, *b))
  np.testing.assert_allclose(product((3, 8), (1, 9)), product((5, 2), (3, 3)), rtol=1e-4)
  assert abs(float(product((3, 8), (1, 9)) - product((3, 8), (9, 1)))) > 1e-4
  cos, _ = rope.rotary_grid(jnp.array([[[0, 5]]]), WIDTH, 1e4)
  quarter = rope.rotary(jnp.array([[5]]), WIDTH // 2, 1e4)[0]
  np.testing.assert_array_equal(cos[..., : WIDTH // 4], 1.0)
  np.testing.assert_array_equal(cos[..., WIDTH // 4 :], quarter)
