"""Pictures that tokenizers are compared on: their scripts and their tests draw the same ones."""

from __future__ import annotations

import numpy as np

from vpe_jax.data.embedded import openmoji


def renders(count: int, side: int) -> np.ndarray:
  """Pictures of OpenMoji, then as many of noise: [2 count, side, side, 3] uint8."""
  source = openmoji.OpenMoji()
  near = [source[i * len(source) // count].image.render(side) for i in range(count)]
  noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
  return np.concatenate([np.stack(near), noise])
