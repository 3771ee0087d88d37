"""The fonts that words are written in: files of PyPI packages, under open licences.

See third_party/fonts.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from PIL import ImageFont

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


@functools.lru_cache(maxsize=64)
def font(name: str, em: float) -> ImageFont.FreeTypeFont:
  """A font of FONTS, its em in pixels.

  Raises:
    UserError: the package that holds it is not installed.
  """
  # Basic, as it is the same everywhere: the other one needs a library of the system.
  return ImageFont.truetype(str(_file(name)), em, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=8192)
def ink(name: str, text: str) -> Box:
  """Where a line's ink lies, in ems from the point on the base line where it begins."""
  mask, (x, y) = font(name, _MEASURED).getmask2(text, 'L', anchor='ls')
  left, top, right, bottom = mask.getbbox()
  edges = (x + left, y + top, x + right, y + bottom)
  return tuple(edge / _MEASURED for edge in edges)


def _file(name: str) -> Path:
  package, file = _FILES[name]
  # Found and not imported: these packages hold files and no code that is of use.
  found = importlib.util.find_spec(package)
  if found is None or found.origin is None:
    raise UserError(
      f'no {name} font: the package that holds it is missing; pip install '
      f'{package.replace("_", "-")}, or install vpe_jax again'
    )
  return Path(found.origin).parent / 'files' / file
