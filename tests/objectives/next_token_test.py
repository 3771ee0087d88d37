"""Next-token cross-entropy: against optax, in chunks, with weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
  wanted = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  loss, hits = next_token.cross_entropy(hidden, table, targets, weights)
  np.testing.assert_allclose(loss, jnp.sum(wanted * weights), rtol=1e-6)
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
