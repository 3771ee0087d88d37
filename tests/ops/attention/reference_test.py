"""The dense definition: against plain softmax attention, absent tokens, gradients, bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError, Visibility, visible
from vpe_jax.ops.attention import chooser, reference

B, L, N, K, H = 2, 7, 6, 2, 8


def _inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  return [
    jax.random.normal(key, (B, L, heads, H)) for key, heads in zip(keys, (N, K, K), strict=True)
  ]


def _visibility() -> Visibility:
  """Causal, but token 2 is absent and tokens 4 to 6 see each other."""
  order = jnp.broadcast_to(jnp.array([0, 1, 0, 2, 3, 4, 5]), (B, L))
  reach = jnp.broadcast_to(jnp.array([1, 2, 0, 3, 6, 6, 6]), (B, L))
  until = jnp.broadcast_to(jnp.array([99, 99, 0, 99, 99, 99, 99]), (B, L))
  return Visibility(order, jnp.zeros_like(order), reach, until)


def _plain(q, k, v, mask, bias=0.0):
  k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
  logits = jnp.einsum('BLNH,BSNH->BNLS', q, k) / np.sqrt(H) + bias
  weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30), -1)
  return jnp.einsum('BNLS,BSNH->BLNH', weights, v)


def test_equals_plain_attention_and_is_zero_for_absent_queries():
  q, k, v = _inputs()
  sequence = _visibility()
  mask = visible(sequence, sequence)
  mixed, lse = reference.attention(q, k, v, sequence, sequence)
  expected = _plain(q, k, v, mask)
  present = np.array([0, 1, 3, 4, 5, 6])
  np.testing.assert_allclose(mixed[:, present], expected[:, present], atol=2e-6)
  assert float(jnp.abs(mixed[:, 2]).max()) == 0
  assert np.isneginf(lse[:, 2]).all() and np.isfinite(lse[:, present]).all()


def test_gradients_equal_and_are_finite():
  q, k, v = _inputs()
  sequence = _visibility()
  mask = visible(sequence, sequence)
  present = (sequence.until > 0)[:, :, None, None]
  ours = jax.grad(
    lambda *a: jnp.sum(jnp.sin(reference.attention(*a, sequence, sequence)[0])), (0, 1, 2)
  )
  theirs = jax.grad(lambda *a: jnp.sum(jnp.where(present, jnp.sin(_plain(*a, mask)), 0)), (0, 1, 2))
  for a, b in zip(ours(q, k, v), theirs(q, k, v), strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_log_sum_exp_and_bias():
  q, k, v = _inputs()
  sequence = _visibility()
  bias = jax.random.normal(jax.random.key(5), (1, N, L, L))
  mixed, lse = reference.attention(q, k, v, sequence, sequence, bias)
  expected = _plain(q, k, v, visible(sequence, sequence), bias)
  np.testing.assert_allclose(mixed[:, 3:], expected[:, 3:], atol=2e-6)
  # The first token sees only itself.
  logit = jnp.einsum('BNH,BNH->BN', q[:, 0], jnp.repeat(k[:, 0], N // K, 1)) / np.sqrt(H)
  np.testing.assert_allclose(lse[:, 0], logit + bias[:, :, 0, 0], atol=2e-6)


def test_bfloat16_stays_close():
  q, k, v = _inputs()
  sequence = _visibility()
  exact = chooser.attention(q, k, v, sequence, sequence)
  low = chooser.attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), sequence, sequence)
  assert low.dtype == jnp.bfloat16
  assert float(jnp.abs(low.astype(jnp.float32) - exact).max()) < 0.05


def test_unknown_implementation_names_the_nearest():
  q, k, v = _inputs()
  with pytest.raises(UserError, match="did you mean 'reference'"):
    chooser.attention(q, k, v, _visibility(), _visibility(), 'referense')
