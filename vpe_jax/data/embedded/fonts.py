"""Fonts for written words: files of PyPI packages under open licences.

See third_party/fonts.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vpe_jax.contracts import UserError
from vpe_jax.data.records import Box

# Name of a font in captions -> its package and file.
_FILES = {
  'sans-serif': ('font_lato', 'Lato-Bold.ttf'),
  'serif': ('font_caladea', 'Caladea-Bold.ttf'),
  'italic': ('font_caladea', 'Caladea-BoldItalic.ttf'),
  'rounded': ('font_fredoka_one', 'FredokaOne-Regular.ttf'),
  'handwritten': ('font_intuitive', 'Intuitive.ttf'),
}
FONTS: tuple[str, ...] = tuple(_FILES)
_MEASURE_EM = 256  # pixels per em at which ink is measured


@functools.lru_cache(maxsize=8192)
def ink(name: str, text: str) -> Box:
  """Bounding box of the ink of a line of text, in ems from the line's origin on the baseline."""
  mask, (left, top) = letters(name, text, _MEASURE_EM)
  edges = (left, top, left + mask.width, top + mask.height)
  return tuple(edge / _MEASURE_EM for edge in edges)


def letters(name: str, text: str, em: int) -> tuple[Image.Image, tuple[int, int]]:
  """Renders a line of text, cropped to its ink.

  Args:
    name: one of FONTS.
    text: the line.
    em: font size in pixels.

  Returns:
    Ink coverage as an 8-bit image, and the position (x, y) of its top left corner in pixels,
    relative to the origin of the line on the baseline.

  Raises:
    UserError: the package of the font is not installed.
  """
  font = _font(name, em)
  left, top, right, bottom = font.getbbox(text, anchor='ls')
  # The bounding box includes advance widths, so it differs from that of the ink; a margin is safe.
  spare = em // 2
  canvas = Image.new('L', (right - left + 2 * spare, bottom - top + 2 * spare))
  draw = ImageDraw.Draw(canvas)
  draw.text((spare - left, spare - top), text, fill=255, font=font, anchor='ls')
  box = canvas.getbbox()
  return canvas.crop(box), (box[0] - spare + left, box[1] - spare + top)


@functools.lru_cache(maxsize=64)
def _font(name: str, em: int) -> ImageFont.FreeTypeFont:
  # The basic layout engine is the same on all systems; Pillow's other one needs a system library.
  return ImageFont.truetype(str(_file(name)), em, layout_engine=ImageFont.Layout.BASIC)


def _file(name: str) -> Path:
  package, file = _FILES[name]
  # Located without importing: only the font files of these packages are of use.
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:
    raise UserError(
      f'no {name} font: its package is missing; pip install '
      f'{package.replace("_", "-")}, or install vpe_jax again'
    )
  return Path(spec.origin).parent / 'files' / file
