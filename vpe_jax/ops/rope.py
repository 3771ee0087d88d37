"""Rotary position embedding, rotate-half form (Qwen2, Llama 3)."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretch of the low frequencies to longer contexts.

  Wavelengths above `original / low` are stretched by `factor`, those below `original / high`
  stay, and those between are blended.
  """

  factor: float = 32.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192


def frequencies(width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
  """Angular frequency of each pair: float32 [width // 2]."""
  freq = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  if scaling is not None:
    wavelength = 2 * math.pi / freq
    blend = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
    blend = np.clip(blend, 0.0, 1.0)
    freq = (1 - blend) * freq / scaling.factor + blend * freq
  return freq.astype(np.float32)


def rotary(
  positions: Array, width: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
  """Cosine and sine tables of `positions` [B, L]: two float32 [B, L, 1, width // 2]."""
  angle = positions.astype(jnp.float32)[..., None, None] * frequencies(width, theta, scaling)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
  """Rotates heads [B, L, N, H]: pair i is (x[i], x[i + H / 2])."""
  cos, sin = tables
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)
