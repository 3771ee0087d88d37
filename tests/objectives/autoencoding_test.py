"""Tokenizer losses against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.objectives import autoencoding


def test_errors_are_means_over_everything_but_the_batch():
  a = jnp.zeros((2, 4, 4, 3))
  b = a.at[0].set(0.5).at[1, 0].set(1.0)
  np.testing.assert_allclose(autoencoding.absolute_error(a, b), [0.5, 0.25])
  np.testing.assert_allclose(autoencoding.squared_error(a, b), [0.25, 0.25])


def test_psnr_in_decibels_and_clipped():
  expected = jnp.ones((3, 4, 4, 3))
  prediction = jnp.stack([jnp.full((4, 4, 3), 0.9), jnp.full((4, 4, 3), 7.0), jnp.zeros((4, 4, 3))])
  np.testing.assert_allclose(autoencoding.psnr(prediction, expected), [20.0, 60.0, 0.0], atol=1e-4)


def test_divergence_is_zero_for_the_standard_normal_and_matches_samples():
  zero = jnp.zeros((1, 2, 2, 1))
  np.testing.assert_allclose(autoencoding.gaussian_divergence(zero, zero), [0.0])
  mean, log_variance = 0.7, -1.0
  x = mean + np.exp(0.5 * log_variance) * np.random.default_rng(0).normal(size=400_000)
  density = lambda x, m, lv: -0.5 * (lv + (x - m) ** 2 / np.exp(lv))
  sampled = np.mean(density(x, mean, log_variance) - density(x, 0.0, 0.0))
  got = autoencoding.gaussian_divergence(zero + mean, zero + log_variance)
  np.testing.assert_allclose(got, [sampled], atol=5e-3)


def test_commitment_moves_codes_more_than_inputs():
  inputs, chosen = jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))
  loss = lambda i, c: jnp.sum(autoencoding.commitment(i, c, beta=0.25))
  np.testing.assert_allclose(loss(inputs, chosen), 3.75)
  to_inputs, to_codes = jax.grad(loss, (0, 1))(inputs, chosen)
  np.testing.assert_allclose(to_codes, jnp.ones((1, 2, 3)))
  np.testing.assert_allclose(to_inputs, jnp.full((1, 2, 3), -0.25))


def test_commitment_is_computed_in_float32():
  inputs, entries = jnp.ones((1, 4, 64), jnp.bfloat16), jnp.full((1, 4, 64), 0.9, jnp.float32)
  loss = autoencoding.commitment(inputs, entries.astype(jnp.bfloat16))
  expected = 1.25 * 64 * (1 - float(jnp.bfloat16(0.9))) ** 2
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_entropies_at_the_extremes():
  one_hot = jnp.eye(4)[None]
  per_token, of_mean = autoencoding.code_entropies(one_hot)
  np.testing.assert_allclose([per_token, of_mean], [0.0, np.log(4)], atol=1e-6)
  uniform = jnp.full((1, 4, 4), 0.25)
  per_token, of_mean = autoencoding.code_entropies(uniform)
  np.testing.assert_allclose([per_token, of_mean], [np.log(4), np.log(4)], atol=1e-6)


def test_the_entropy_of_the_mean_has_a_gradient_for_unused_codes():
  logits = jnp.zeros((1, 8, 4)).at[..., 0].set(5.0)
  of_mean = lambda x: autoencoding.code_entropies(jax.nn.softmax(x, -1))[1]
  gradient = jax.grad(of_mean)(logits)
  assert (gradient[..., 1:] > 0).all() and (gradient[..., 0] < 0).all()


def test_perplexity_counts_codes_in_use():
  perplexity = lambda codes: autoencoding.perplexity(jnp.asarray(codes), 8)
  np.testing.assert_allclose(perplexity([[0, 1], [2, 3]]), 4.0, rtol=1e-5)
  np.testing.assert_allclose(perplexity([[0, 0], [0, 0]]), 1.0, rtol=1e-5)
