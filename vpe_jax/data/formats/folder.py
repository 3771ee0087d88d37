"""A user's own pictures: a folder of images with `captions.jsonl`, or a `.txt` beside each.

Pictures in subfolders are of the class that their folder is called after; where that is all a model
asks for, they need no captions.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from absl import logging

from vpe_jax.contracts import UserError
from vpe_jax.data.filters import EVERYTHING, Filter
from vpe_jax.data.records import Record
from vpe_jax.data.transforms import read_image, to_square
from vpe_jax.storage import local, read_lines, read_text

_ENDINGS = frozenset({'.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff'})
_CAPTIONS = 'captions.jsonl'
_SHOWN = 80  # letters of a name that an error shows

Names = tuple[str, str, str]  # file name, caption, file name of the picture before or ''
Entry = tuple[Names, Mapping[str, Any], str]  # what a record is made of, other fields, place


@dataclasses.dataclass(frozen=True)
class FieldSpec:
  """Fields that each image of a source must have, and their names.

  Attributes:
    captions: whether each has a caption.
    references: whether each has a picture before an edit.
    image: field of the picture, where it is not one of the usual ones, which each kind of source
      names; so are `caption` and `reference`.
  """

  captions: bool = True
  references: bool = False
  image: str = ''
  caption: str = ''
  reference: str = ''


@dataclasses.dataclass(frozen=True)
class File:
  """A picture in a file, made a square by `data.fit` when drawn."""

  path: str
  fit: str = 'pad'

  def render(self, size: int) -> np.ndarray:
    """The file's picture as uint8 [size, size, 3].

    Raises:
      UserError: the file can't be read as a picture; names it.
    """
    return to_square(read_image(self.path), size, self.fit)


@dataclasses.dataclass(frozen=True)
class Bytes:
  """A picture as the bytes of its file, made a square by `data.fit` when drawn.

  `name` is what an error calls it.
  """

  content: bytes = dataclasses.field(repr=False)
  name: str
  fit: str = 'pad'

  def render(self, size: int) -> np.ndarray:
    """The picture as uint8 [size, size, 3].

    Raises:
      UserError: the bytes are no picture.
    """
    return to_square(read_image(io.BytesIO(self.content), self.name), size, self.fit)


@dataclasses.dataclass(frozen=True)
class Folder:
  """Captioned image files as a source, sorted by file name."""

  path: str
  entries: tuple[Names, ...]  # files within the folder
  fit: str = 'pad'

  def __len__(self) -> int:
    return len(self.entries)

  def __getitem__(self, index: int) -> Record:
    name, caption, before = self.entries[index]
    return Record(
      id=record_id(name),
      caption=caption,
      group=group_of(name),
      split='train',
      image=self._file(name),
      reference=self._file(before) if before else None,
    )

  def _file(self, name: str) -> File:
    return File(str(Path(self.path) / name), self.fit)

  def stamps(self) -> Iterator[str]:
    """Path, size and date of every file; see vpe_jax.data.records.StoredSource."""
    for name, _, before in self.entries:
      for path in [self._file(each).path for each in (name, before) if each]:
        found = os.stat(path)
        yield f'{path} {found.st_size} {found.st_mtime_ns}'


def record_id(name: str) -> str:
  """The id of the picture in a file of the folder."""
  return f'folder/{name}'


def group_of(name: str) -> str:
  """The class of the picture in a file: the folder that it lies in."""
  return PurePosixPath(name).parent.name or 'folder'


def open_folder(
  path: str, count: int = 0, fields: FieldSpec = FieldSpec(), keep: Filter = EVERYTHING
) -> Folder:
  """Finds images and captions; pictures themselves are read when drawn.

  Args:
    path: the folder. A `captions.jsonl` in it has lines such as
      `{"file": "fox.png", "caption": "a red fox"}` (also `image`, `text`; what `keep` reads:
      vpe_jax.data.filters) for pictures within the folder; without one, each image needs a text
      file of the same name beside it. Hidden files are passed over. A line whose caption is an
      instruction names the picture before as its `reference`.
    count: number of records to keep, the first by name, with a warning; 0 for all.
    fields: what pictures need; without captions, an absent `captions.jsonl` asks for no text files.
    keep: which of the records are kept, and how their pictures become squares.

  Raises:
    UserError: the folder is missing or empty, an image has no caption, a text or a line can't be
      read, or the filter finds nothing, or not what it needs.
  """
  folder = local(path)
  kept, read = set(), 0
  for names, values, where in find(folder, fields):
    read += 1
    for name in names[::2]:
      _check_file(folder, name, where)
    if keep.passes(values, names[1], folder / names[0], where):
      kept.add(names)
  if not read:
    raise UserError(f'data folder {folder} has no images ({", ".join(sorted(_ENDINGS))})')
  if not kept:
    raise UserError(
      f'data folder {folder}: none of its {read} records passes data.language and '
      'data.least_text_height; ask for less'
    )
  entries = sorted(kept)
  return Folder(str(folder), tuple(entries[: first_of(len(entries), count, path)]), keep.fit)


def first_of(total: int, count: int, path: str) -> int:
  """How many of the records of a data folder `data.examples` keeps, with a warning if not all."""
  if not 0 < count < total:
    return total
  logging.warning(
    'data folder %s: only the first %d of %d pictures are used; --config.data.examples=0 takes all',
    path,
    count,
    total,
  )
  return count


def find(folder: Path, fields: FieldSpec) -> Iterator[Entry]:
  """Entries of a folder, one image after the other, in no order; opens no image.

  Args:
    folder: as `open_folder` reads it.
    fields: what pictures need; of `image`, `caption` and `reference` the usual fields are `file` or
      `image`, `caption` or `text`, and `reference`.

  Raises:
    UserError: the folder is missing, a picture lacks what is fields for, or a text can't be read.
  """
  if not folder.is_dir():
    raise UserError(f'data folder {folder} does not exist: folder:PATH names one that does')
  listed = folder / _CAPTIONS
  yield from _from_lines(folder, listed, fields) if listed.exists() else _from_texts(folder, fields)


def _from_lines(folder: Path, listed: Path, fields: FieldSpec) -> Iterator[Entry]:
  images = [fields.image] if fields.image else ['file', 'image']
  captions = [fields.caption] if fields.caption else ['caption', 'text']
  for number, line in enumerate(read_lines(listed), 1):
    if not line.strip():
      continue
    try:
      values = json.loads(line)
    except (ValueError, RecursionError) as error:  # Too many digits, too many brackets.
      raise UserError(f'{listed} line {number} is not JSON: {error}') from error
    where = f'{listed} line {number}'
    name, caption = first_text(values, *images), first_text(values, *captions) or ''
    if name is None:
      raise UserError(f'{where} names no image: give it a "{images[0]}"')
    if fields.captions and not valid(caption, where):
      raise UserError(f'{where}: image {name} has no caption; give it a "{captions[0]}"')
    yield (
      (_within(folder, name, where), caption, _before(folder, values, fields, where)),
      values,
      where,
    )


def _before(folder: Path, values: Any, fields: FieldSpec, where: str) -> str:
  """The name of the picture before an edit, or '' where none is fields for."""
  if not fields.references:
    return ''
  field = fields.reference or 'reference'
  if (name := first_text(values, field)) is None:
    raise UserError(f'{where} names no picture before: give it a "{field}"')
  return _within(folder, name, where)


def _within(folder: Path, name: str, where: str) -> str:
  """The name of a picture in the folder, in one spelling."""
  path = PurePosixPath(name)
  if path.is_absolute() or '..' in path.parts:
    raise UserError(f'{where}: image {_shown(name)} lies outside the folder: copy it into {folder}')
  return str(path)


def _check_file(folder: Path, name: str, where: str) -> None:
  """Refuses a picture that isn't there; '' is none."""
  try:
    found = not name or (folder / name).is_file()
  except OSError as error:  # Its name is longer than names can be.
    raise UserError(f'{where}: image {_shown(name)} can not be read ({error.strerror})') from error
  if not found:
    raise UserError(f'{where}: image {folder / _shown(name)} does not exist')


def _shown(name: str) -> str:
  return name if len(name) <= _SHOWN else f'{name[:_SHOWN]}...'


def valid(text: str, where: str, what: str = 'caption') -> str:
  """A caption, or another text, that can be written as UTF-8.

  Raises:
    UserError: it can't; names `where`.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: the {what} is not valid text ({error.reason}): write it in UTF-8'
    ) from error
  return text


def first_text(values: Any, *names: str) -> str | None:
  """The first of the named fields that holds text."""
  found = [values.get(name) for name in names] if isinstance(values, dict) else []
  return next((text.strip() for text in found if isinstance(text, str) and text.strip()), None)


def _from_texts(folder: Path, fields: FieldSpec) -> Iterator[Entry]:
  if fields.references:
    raise UserError(f'data folder {folder} has no {_CAPTIONS}: only its lines name pictures before')
  for image in folder.rglob('*'):
    hidden = any(part.startswith('.') for part in image.relative_to(folder).parts)
    if hidden or image.suffix.lower() not in _ENDINGS or not image.is_file():
      continue
    text = image.with_suffix('.txt')
    caption = ' '.join(read_text(text).split()) if text.is_file() else ''
    if fields.captions and not caption:
      raise UserError(f'image {image} has no caption: write one to {text.name} beside it')
    yield (image.relative_to(folder).as_posix(), caption, ''), {}, f'image {image}'
