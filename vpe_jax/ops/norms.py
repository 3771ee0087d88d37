"""Normalisations: reductions in float32, results in the dtype of the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """x / rms(x) * scale over the last axis."""
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
  return (wide * scale).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
  """(x - mean) / std * scale + bias over the last axis."""
  wide = x.astype(jnp.float32)
  wide = wide - jnp.mean(wide, -1, keepdims=True)
  wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
  return (wide * scale + bias).astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
  """x * (1 + scale) + shift in float32; shift and scale are `[B, 1, D]` or `[B, L, D]`."""
  return (x.astype(jnp.float32) * (1.0 + scale) + shift).astype(x.dtype)
