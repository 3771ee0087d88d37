"""Draws what a Truth has written in it, at any size."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from vpe_jax.data.embedded import fonts, shapes
from vpe_jax.data.records import Truth, Writing

_FINER = 4  # pixels in the place of one, per side, before the edges are smoothed


@dataclasses.dataclass(frozen=True)
class Lettering:
  """A picture of words: one colour of ink on a plain ground, or on one that fades to another."""

  truth: Truth

  def render(self, size: int) -> np.ndarray:
    """The words on their ground as uint8 [size, size, 3]."""
    truth = self.truth
    top = np.array(shapes.ground_colour(truth.ground), np.float32)
    bottom = np.array(shapes.ground_colour(truth.fade or truth.ground), np.float32)
    share = ((np.arange(size) + 0.5) / size)[:, None, None]
    ground = np.broadcast_to(top + (bottom - top) * share, (size, size, 3))
    ink = np.array(shapes.COLOURS[truth.writing.colour], np.float32)
    cover = _coverage(truth.writing, size)[..., None]
    return np.rint(ground + (ink - ground) * cover).astype(np.uint8)


def _coverage(writing: Writing, size: int) -> np.ndarray:
  """How much of each pixel is ink: float32 [size, size] in [0, 1]."""
  side = size * _FINER
  canvas = Image.new('L', (side, side))
  for word in writing.words:
    left, top, right, bottom = (round(side * edge) for edge in word.box)
    start, _, end, _ = fonts.ink(writing.font, word.text)
    # Drawn at a power of two and scaled: letters are spaced alike in all sizes.
    em = 2 ** math.ceil(math.log2((right - left) / (end - start)))
    drawn, _ = fonts.letters(writing.font, word.text, em)
    canvas.paste(drawn.resize((right - left, bottom - top)), (left, top))
  small = canvas.resize((size, size), Image.Resampling.BOX)
  return np.asarray(small, np.float32) / 255
