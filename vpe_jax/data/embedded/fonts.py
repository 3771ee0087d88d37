"""The fonts that words are written in: files of PyPI packages, under open licences.

See third_party/fonts.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vpe_jax.contracts import UserError
from vpe_jax.data.records import Box

# What captions call a font -> the package that holds it, and its file.
_FILES = {
  'sans-serif': ('font_lato', 'Lato-Bold.ttf'),
  'serif': ('font_caladea', 'Caladea-Bold.ttf'),
  'italic': ('font_caladea', 'Caladea-BoldItalic.ttf'),
  'rounded': ('font_fredoka_one', 'FredokaOne-Regular.ttf'),
  'handwritten': ('font_intuitive', 'Intuitive.ttf'),
}
FONTS: tuple[str, ...] = tuple(_FILES)
_MEASURED = 256  # pixels an em at which letters are measured


@functools.lru_cache(maxsize=8192)
def ink(name: str, text: str) -> Box:
  """Where a line's ink lies, in ems from the point on the base line where it begins."""
  mask, (left, top) = letters(name, text, _MEASURED)
  edges = (left, top, left + mask.width, top + mask.height)
  return tuple(edge / _MEASURED for edge in edges)


def letters(name: str, text: str, em: int) -> tuple[Image.Image, tuple[int, int]]:
  """A line of letters, cut to its ink.

  Args:
    name: one of FONTS.
    text: the line.
    em: in pixels.

  Returns:
    How much of each pixel is ink, 8 bits, and the place of its corner from the point on the base
    line where the line begins.

  Raises:
    UserError: the package that holds the font is not installed.
  """
  font = _font(name, em)
  left, top, right, bottom = font.getbbox(text, anchor='ls')
  # What is measured goes by the letters' advance: their ink may go beyond it.
  spare = em // 2
  canvas = Image.new('L', (right - left + 2 * spare, bottom - top + 2 * spare))
  draw = ImageDraw.Draw(canvas)
  draw.text((spare - left, spare - top), text, fill=255, font=font, anchor='ls')
  found = canvas.getbbox()
  return canvas.crop(found), (found[0] - spare + left, found[1] - spare + top)


@functools.lru_cache(maxsize=64)
def _font(name: str, em: int) -> ImageFont.FreeTypeFont:
  # Basic, as it is the same everywhere: the other layout needs a library of the system.
  return ImageFont.truetype(str(_file(name)), em, layout_engine=ImageFont.Layout.BASIC)


def _file(name: str) -> Path:
  package, file = _FILES[name]
  # RawRecord and not imported: these packages hold files and no code that is of use.
  found = importlib.util.find_spec(package)
  if found is None or found.origin is None:
    raise UserError(
      f'no {name} font: the package that holds it is missing; pip install '
      f'{package.replace("_", "-")}, or install vpe_jax again'
    )
  return Path(found.origin).parent / 'files' / file
