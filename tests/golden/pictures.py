"""Images for comparisons of tokenizers, shared by the scripts and the tests."""

from __future__ import annotations

import numpy as np

from vpe_jax.data.embedded import openmoji


def renders(count: int, side: int) -> np.ndarray:
  """Images of OpenMoji, then as many of noise: [2 count, side, side, 3] uint8."""
  source = openmoji.OpenMoji()
  emoji = [source[i * len(source) // count].image.render(side) for i in range(count)]
  noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
  return np.concatenate([np.stack(emoji), noise])
