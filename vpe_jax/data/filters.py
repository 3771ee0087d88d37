"""Filters for the records of a folder: by language, and by the height of text in the image.

Filters read two fields of a line of `captions.jsonl`:

  language   language of the caption, such as `en` or `en-US`
  texts      text in the image: a list of {"text": words, "box": [left, top, right, bottom]}; [] if
             there is none. Boxes are in pixels of the upright image (after EXIF rotation).
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vpe_jax.contracts import UserError
from vpe_jax.data.transforms import read_size

FIELDS = ('language', 'texts')  # fields that filters read
ENGLISH = 'en'


@dataclasses.dataclass(frozen=True)
class Filter:
  """Criteria that a record must meet.

  Attributes:
    language: required language, such as `en` (empty: any). Regions are ignored: `en-US` is `en`. A
      record without the field `language` counts as English if all letters of its caption and its
      `texts` are Latin; for other languages, every record needs the field.
    least_text_height: minimum height of each box in `texts`, in pixels of the square image (0:
      any).
    size: side of the square image, in pixels.
    fit: how images become square; see data.fit.
    section: path of the config section that sets the filter, for error messages.
  """

  language: str = ''
  least_text_height: int = 0
  size: int = 0
  fit: str = 'pad'
  section: str = 'data.'

  def passes(
    self, values: Mapping[str, Any], caption: str, image: Path | BinaryIO, where: str
  ) -> bool:
    """Whether a record meets the criteria.

    Args:
      values: fields of the record.
      caption: its caption.
      image: path of the image, or an open file.
      where: location of the record, for error messages.

    Raises:
      UserError: a field that the filter needs is missing or malformed.
    """
    return self._matches_language(values, caption, where) and self._is_legible(values, image, where)

  def _matches_language(self, values: Mapping[str, Any], caption: str, where: str) -> bool:
    if not self.language:
      return True
    language = values.get('language')
    if language is not None and not isinstance(language, str):
      raise UserError(f'{where}: "language" is {language!r}: write it as a word, such as "en"')
    if language:
      return _primary(language) == _primary(self.language)
    if _primary(self.language) != ENGLISH:
      raise UserError(
        f'{where} has no "language", which {self.section}language={self.language} needs: add one '
        f'to each line of captions.jsonl (only {ENGLISH} is detected without it)'
      )
    texts = [text for text, _ in _texts(values, where)] if 'texts' in values else []
    return all(map(_is_latin, ''.join([caption, *texts])))

  def _is_legible(self, values: Mapping[str, Any], image: Path | BinaryIO, where: str) -> bool:
    if not self.least_text_height:
      return True
    if 'texts' not in values:
      raise UserError(
        f'{where} has no "texts", which {self.section}least_text_height='
        f'{self.least_text_height} needs: add them with their boxes to each line of '
        f'captions.jsonl, or set {self.section}least_text_height=0'
      )
    heights = [bottom - top for _, (_, top, _, bottom) in _texts(values, where)]
    if not heights:
      return True
    side = (max if self.fit == 'pad' else min)(
      read_size(image, '' if isinstance(image, Path) else where)
    )
    return min(heights) * self.size / side >= self.least_text_height


KEEP_ALL = Filter()


def _texts(values: Mapping[str, Any], where: str) -> list[tuple[str, tuple[float, ...]]]:
  """(text, box) of each item of the field `texts`.

  Raises:
    UserError: the field does not have the form that the module docstring describes.
  """
  try:
    texts = [(item['text'], tuple(map(float, item['box']))) for item in values['texts']]
    valid = all(
      isinstance(text, str) and len(box) == 4 and box[0] <= box[2] and box[1] <= box[3]
      for text, box in texts
    ) and all(math.isfinite(side) for _, box in texts for side in box)
  except (TypeError, KeyError, ValueError, OverflowError):  # the last: an integer of 400 digits
    valid = False
  if not valid:
    raise UserError(
      f'{where}: "texts" must be a list of {{"text": words, "box": [left, top, right, bottom]}}'
    )
  return texts


def _primary(language: str) -> str:
  """The language without its region: `en` for `en-US`."""
  return language.replace('_', '-').split('-')[0].strip().lower()


def _is_latin(character: str) -> bool:
  """Whether a character is a Latin letter, or no letter at all."""
  return not character.isalpha() or unicodedata.name(character, '').startswith('LATIN')
