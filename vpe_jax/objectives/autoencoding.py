"""Losses of the tokenizers: reconstruction, divergence of latents, use of a codebook."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array


def absolute_error(prediction: Array, wanted: Array) -> Array:
  """Mean absolute error of each example: [B, ...] -> float32 [B]."""
  return _mean(jnp.abs(_difference(prediction, wanted)))


def squared_error(prediction: Array, wanted: Array) -> Array:
  """Mean squared error of each example: [B, ...] -> float32 [B]."""
  return _mean(jnp.square(_difference(prediction, wanted)))


def psnr(prediction: Array, wanted: Array) -> Array:
  """Peak signal-to-noise ratio in dB of each picture in [0, 1]; predictions are clipped first.

  Errors below 1e-6 (60 dB) count as 1e-6.
  """
  error = squared_error(jnp.clip(prediction, 0.0, 1.0), wanted)
  return -10.0 * jnp.log10(jnp.maximum(error, 1e-6))


def gaussian_divergence(mean: Array, log_variance: Array) -> Array:
  """KL(N(mean, var) || N(0, 1)) in nats per latent value, for each example: float32 [B]."""
  mean, log_variance = mean.astype(jnp.float32), log_variance.astype(jnp.float32)
  return 0.5 * _mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)


def commitment(inputs: Array, chosen: Array, beta: float = 0.25) -> Array:
  """Pulls codes to inputs and, `beta` times as hard, inputs to codes: [B, P, D] -> float32 [B].

  Neural Discrete Representation Learning (arXiv 1711.00937), Eq. 3; mean over patches of the
  squared distance.
  """
  distance = lambda a, b: jnp.mean(jnp.sum(jnp.square(a - b), -1), -1)
  hold = jax.lax.stop_gradient
  return distance(hold(inputs), chosen) + beta * distance(inputs, hold(chosen))


def code_entropies(probabilities: Array) -> tuple[Array, Array]:
  """Mean entropy of each token's choice, and entropy of the mean choice, in nats.

  Args:
    probabilities: soft choice of a code for each token [B, P, V], float32.

  Returns:
    Two scalars. Small first and large second mean sure choices that use the whole codebook
    (arXiv 2310.05737, Eq. 5); the second reaches every code through the softmax, so codes that
    no token chooses are drawn back to the data.
  """
  entropy = lambda p: -jnp.sum(p * jnp.log(p + 1e-9), -1)
  return jnp.mean(entropy(probabilities)), entropy(jnp.mean(probabilities, (0, 1)))


def perplexity(codes: Array, size: int) -> Array:
  """exp(entropy) of how often each of `size` codes occurs: 1 (one code) to `size` (all alike)."""
  share = jnp.mean(jax.nn.one_hot(codes.reshape(-1), size), 0)
  return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12))))


def _difference(prediction: Array, wanted: Array) -> Array:
  return prediction.astype(jnp.float32) - wanted.astype(jnp.float32)


def _mean(x: Array) -> Array:
  return jnp.mean(x.reshape(x.shape[0], -1), -1)
