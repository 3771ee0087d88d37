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


def group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float) -> Array:
  """Normalizes groups of channels of `[B, H, W, C]` to mean 0 and std 1, then * scale + bias."""
  wide = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
  wide = wide - jnp.mean(wide, (1, 2, 4), keepdims=True)
  wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), (1, 2, 4), keepdims=True) + eps)
  return (wide.reshape(x.shape) * scale + bias).astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
  """x * (1 + scale) + shift in float32; shift and scale are `[B, 1, D]` or `[B, L, D]`."""
  return (x.astype(jnp.float32) * (1.0 + scale) + shift).astype(x.dtype)
