"""Next-token cross-entropy: against optax, in chunks, with weights."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpe_jax import sharding
from vpe_jax.config import MeshConfig
from vpe_jax.objectives import next_token

B, L, D, V = 2, 6, 8, 11


def _inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (B, L, D))
  table = jax.random.normal(keys[1], (V, D))
  targets = jax.random.randint(keys[2], (B, L), 0, V)
  weights = jnp.array([[1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]], jnp.float32)
  return hidden, table, targets, weights


def test_equals_optax():
  hidden, table, targets, weights = _inputs()
  logits = hidden @ table.T
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  loss, hits = next_token.cross_entropy(hidden, table, targets, weights)
  np.testing.assert_allclose(loss, jnp.sum(expected * weights), rtol=1e-6)
  assert float(hits) == float(jnp.sum((logits.argmax(-1) == targets) * weights))


@pytest.mark.parametrize('chunk', [1, 2, 4, 5])  # 4 and 5 don't divide the 6 tokens
def test_chunks_change_neither_loss_nor_gradient(chunk):
  hidden, table, targets, weights = _inputs()
  loss = lambda hidden, table, chunk: next_token.cross_entropy(
    hidden, table, targets, weights, chunk
  )[0]
  whole = jax.value_and_grad(loss, (0, 1))(hidden, table, 0)
  parts = jax.value_and_grad(loss, (0, 1))(hidden, table, chunk)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_indivisible_vocabulary_is_sharded_over_the_tensor_axis():
  hidden, table, targets, weights = _inputs()
  loss = lambda hidden, table: next_token.cross_entropy(hidden, table, targets, weights, 4)
  run = lambda: jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  whole = run()(hidden, table)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4, strategy='fsdp_tensor'))
  with jax.set_mesh(mesh):
    sharded = run()(hidden, table)
    text = run().lower(hidden, table).compile().as_text()
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  # The table of 11 tokens is padded to 12, of which a device has 3.
  assert re.search(r'f32\[\d+,4,3\]', text) and not re.search(r'f32\[\d+,4,1[12]\]', text)
