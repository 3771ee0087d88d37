"""Rotary position embedding: along a sequence (Qwen2, Llama 3) or a grid (LlamaGen)."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from vpe_jax.config import check, check_positive, check_sizes
from vpe_jax.contracts import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretch of the low frequencies to longer contexts.

  Wavelengths above `original / low` are stretched by `factor`, those below `original / high`
  stay, and those between are blended. `original` is the context length before the stretch.
  """

  factor: float = 32.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192

  def __post_init__(self) -> None:
    check_sizes(self)
    check_positive(self, '', 'factor', 'low', 'high')
    check(self, '', 'high', self.high > self.low, f'above low={self.low}')


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


def rotary_grid(positions: Array, width: int, theta: float) -> tuple[Array, Array]:
  """Tables of grid rows and columns [B, L, 2]: two float32 [B, L, 1, width // 2].

  The first half of the pairs is rotated by the row, the second by the column, each half with all
  frequencies of a head half as wide (LlamaGen).
  """
  parts = [rotary(positions[..., axis], width // 2, theta) for axis in (0, 1)]
  cos, sin = (jnp.concatenate(both, axis=-1) for both in zip(*parts))
  return cos, sin


def rotate(x: Array, tables: tuple[Array, Array], adjacent: bool = False) -> Array:
  """Rotates heads [B, L, N, H] by the cosines and sines of `rotary` or `rotary_grid`.

  Pair i is (x[i], x[i + H / 2]), or, if `adjacent`, (x[2i], x[2i + 1]).
  """
  cos, sin = tables
  wide = x.astype(jnp.float32)
  first, second = (wide[..., 0::2], wide[..., 1::2]) if adjacent else jnp.split(wide, 2, axis=-1)
  rotated = first * cos - second * sin, second * cos + first * sin
  if adjacent:
    return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
