"""Which records of a folder are trained on: those in one language, with text that can be read.

Both look at fields of a line of `captions.jsonl`:

  language   of the record's words, such as `en` or `en-US`
  texts      what is written in the picture: a list of {"text": words, "box": [left, top, right,
             bottom]}, the box in pixels of the file as it is seen, upright; [] where nothing is
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vpe_jax.contracts import UserError
from vpe_jax.data.transforms import read_size

FIELDS = ('language', 'texts')  # that filters look at
ENGLISH = 'en'


@dataclasses.dataclass(frozen=True)
class Filter:
  """Criteria for the records to keep.

  Attributes:
    language: of records that are kept, such as `en` (empty: all). A record is in the language that
      its `language` says, whatever the region. One that doesn't say is English if all letters of
      its caption and of its `texts` are Latin; in other languages each record has to say.
    least_text_height: pixels of the lowest of its `texts`, once the picture is a square of `size`
      (0: any).
    size: side of that square in pixels.
    fit: how the picture becomes one, see data.fit.
  """

  language: str = ''
  least_text_height: int = 0
  size: int = 0
  fit: str = 'pad'

  def passes(
    self, values: Mapping[str, Any], caption: str, image: Path | BinaryIO, where: str
  ) -> bool:
    """Whether a record is kept.

    Args:
      values: its fields.
      caption: what it says of the picture.
      image: the picture's file, by its path or open.
      where: what an error calls the record.

    Raises:
      UserError: it lacks a field that the filter needs, or has a wrong one.
    """
    return self._is_spoken(values, caption, where) and self._is_legible(values, image, where)

  def _is_spoken(self, values: Mapping[str, Any], caption: str, where: str) -> bool:
    if not self.language:
      return True
    said = values.get('language')
    if said is not None and not isinstance(said, str):
      raise UserError(f'{where}: "language" is {said!r}: write it as a word, such as "en"')
    if said:
      return _primary(said) == _primary(self.language)
    if _primary(self.language) != ENGLISH:
      raise UserError(
        f'{where} has no "language", which data.language={self.language} looks for: add one to '
        f'each line of captions.jsonl (only {ENGLISH} can be told without)'
      )
    written = [text for text, _ in _texts(values, where)] if 'texts' in values else []
    return all(map(_is_latin, ''.join([caption, *written])))

  def _is_legible(self, values: Mapping[str, Any], image: Path | BinaryIO, where: str) -> bool:
    if not self.least_text_height:
      return True
    if 'texts' not in values:
      raise UserError(
        f'{where} has no "texts", which data.least_text_height={self.least_text_height} looks for: '
        'add them with their boxes to each line of captions.jsonl, or set it to 0'
      )
    heights = [bottom - top for _, (_, top, _, bottom) in _texts(values, where)]
    if not heights:
      return True
    side = (max if self.fit == 'pad' else min)(
      read_size(image, '' if isinstance(image, Path) else where)
    )
    return min(heights) * self.size / side >= self.least_text_height


EVERYTHING = Filter()


def _texts(values: Mapping[str, Any], where: str) -> list[tuple[str, tuple[float, ...]]]:
  """The words and boxes of a record's `texts`.

  Raises:
    UserError: they are not of the form that this file's docstring says.
  """
  try:
    found = [(item['text'], tuple(map(float, item['box']))) for item in values['texts']]
    good = all(
      isinstance(text, str) and len(box) == 4 and box[0] <= box[2] and box[1] <= box[3]
      for text, box in found
    )
  except (TypeError, KeyError, ValueError):
    good = False
  if not good:
    raise UserError(
      f'{where}: "texts" must be a list of {{"text": words, "box": [left, top, right, bottom]}}'
    )
  return found


def _primary(language: str) -> str:
  """`en` of `en-US`."""
  return language.replace('_', '-').split('-')[0].strip().lower()


def _is_latin(letter: str) -> bool:
  """Whether a character is no letter, or a Latin one."""
  return not letter.isalpha() or unicodedata.name(letter, '').startswith('LATIN')
