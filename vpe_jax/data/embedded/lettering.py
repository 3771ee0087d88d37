"""Renders the writing of a Truth at any size."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from vpe_jax.data.embedded import fonts, shapes
from vpe_jax.data.records import Truth, Writing

_SUPERSAMPLING = 4  # per side, for smooth edges


@dataclasses.dataclass(frozen=True)
class Lettering:
  """An image of written words: one ink colour on a plain or gradient background."""

  truth: Truth

  def render(self, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3]."""
    truth = self.truth
    top = np.array(shapes.background_colour(truth.background), np.float32)
    bottom = np.array(shapes.background_colour(truth.fade or truth.background), np.float32)
    share = ((np.arange(size) + 0.5) / size)[:, None, None]
    background = np.broadcast_to(top + (bottom - top) * share, (size, size, 3))
    ink = np.array(shapes.COLOURS[truth.writing.colour], np.float32)
    coverage = _coverage(truth.writing, size)[..., None]
    return np.rint(background + (ink - background) * coverage).astype(np.uint8)


def _coverage(writing: Writing, size: int) -> np.ndarray:
  """Ink coverage of each pixel: float32 [size, size] in [0, 1]."""
  side = size * _SUPERSAMPLING
  canvas = Image.new('L', (side, side))
  for word in writing.words:
    left, top, right, bottom = (round(side * edge) for edge in word.box)
    start, _, end, _ = fonts.ink(writing.font, word.text)
    # Rendered at a power of two and scaled, so that letter spacing is the same at all sizes.
    em = 2 ** math.ceil(math.log2((right - left) / (end - start)))
    letters, _ = fonts.letters(writing.font, word.text, em)
    canvas.paste(letters.resize((right - left, bottom - top)), (left, top))
  small = canvas.resize((size, size), Image.Resampling.BOX)
  return np.asarray(small, np.float32) / 255
