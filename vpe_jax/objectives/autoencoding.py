"""Losses of tokenizers: reconstruction, divergence of latents, use of the codebook."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array


def absolute_error(prediction: Array, target: Array) -> Array:
  """Mean absolute error of each example: [B, ...] -> float32 [B]."""
  return _mean(jnp.abs(_difference(prediction, target)))


def squared_error(prediction: Array, target: Array) -> Array:
  """Mean squared error of each example: [B, ...] -> float32 [B]."""
  return _mean(jnp.square(_difference(prediction, target)))


def psnr(prediction: Array, target: Array) -> Array:
  """Peak signal-to-noise ratio of each example in dB: [B, ...] in [0, 1] -> float32 [B].

  Predictions are clipped to [0, 1] first. Errors below 1e-6 (60 dB) count as 1e-6.
  """
  error = squared_error(jnp.clip(prediction, 0.0, 1.0), target)
  return -10.0 * jnp.log10(jnp.maximum(error, 1e-6))


def gaussian_divergence(mean: Array, log_variance: Array) -> Array:
  """KL(N(mean, var) || N(0, 1)) in nats per latent value, for each example: float32 [B]."""
  mean, log_variance = mean.astype(jnp.float32), log_variance.astype(jnp.float32)
  return 0.5 * _mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)


def commitment(inputs: Array, entries: Array, beta: float = 0.25) -> Array:
  """Codebook loss plus `beta` times commitment loss: [B, P, D] -> float32 [B].

  Both are mean squared distances over patches between inputs and their codebook entries; the first
  trains the entries, the second the inputs (VQ-VAE, arXiv 1711.00937, Eq. 3).
  """
  distance = lambda a, b: jnp.mean(jnp.sum(jnp.square(_difference(a, b)), -1), -1)
  stop = jax.lax.stop_gradient
  return distance(stop(inputs), entries) + beta * distance(inputs, stop(entries))


def code_entropies(probabilities: Array) -> tuple[Array, Array]:
  """Mean entropy of token assignments, and entropy of the mean assignment, in nats.

  Args:
    probabilities: soft assignment of a code to each token [B, P, V], float32.

  Returns:
    Two scalars. If the first is small and the second large, assignments are confident and use the
    whole codebook (arXiv 2310.05737, Eq. 5). The second has a gradient for every code, so that
    unused codes move towards the data.
  """
  entropy = lambda p: -jnp.sum(p * jnp.log(p + 1e-9), -1)
  return jnp.mean(entropy(probabilities)), entropy(jnp.mean(probabilities, (0, 1)))


def perplexity(codes: Array, size: int) -> Array:
  """exp(entropy) of code frequencies: 1 (a single code) to `size` (uniform)."""
  share = jnp.mean(jax.nn.one_hot(codes.reshape(-1), size), 0)
  return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12))))


def _difference(prediction: Array, target: Array) -> Array:
  return prediction.astype(jnp.float32) - target.astype(jnp.float32)


def _mean(x: Array) -> Array:
  return jnp.mean(x.reshape(x.shape[0], -1), -1)
