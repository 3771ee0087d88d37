"""Folders of user images, with a `captions.jsonl` or a `.txt` file for each image.

The name of a subfolder is the class of its images. Class-conditional models need no captions.
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
from vpe_jax.data.filters import KEEP_ALL, Filter
from vpe_jax.data.records import Record
from vpe_jax.data.transforms import read_image, to_square
from vpe_jax.storage import local_path, read_lines, read_text

_ENDINGS = frozenset(
  {'.png', '.jpg', '.jpeg', '.webp', '.avif', '.bmp', '.gif', '.tif', '.tiff'}
)
_CAPTIONS = 'captions.jsonl'
_MAX_NAME = 80  # characters of a file name in an error message

Names = tuple[str, str, str]  # image file, caption, source image file of an edit or ''
Entry = tuple[Names, Mapping[str, Any], str]  # names, other fields, location for error messages


@dataclasses.dataclass(frozen=True)
class FieldSpec:
  """Fields that each record of a user's data must have, and their names.

  Attributes:
    captions: whether each record must have a caption.
    references: whether each record must have a source image (edits).
    image: name of the image field; '' for the default names of each format.
    caption: name of the caption field; likewise.
    reference: name of the field of the source image; likewise.
  """

  captions: bool = True
  references: bool = False
  image: str = ''
  caption: str = ''
  reference: str = ''


@dataclasses.dataclass(frozen=True)
class File:
  """An image file, made square by `data.fit` when rendered."""

  path: str
  fit: str = 'pad'

  def render(self, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3].

    Raises:
      UserError: the file is not a readable image; the message names it.
    """
    return to_square(read_image(self.path), size, self.fit)


@dataclasses.dataclass(frozen=True)
class Bytes:
  """An encoded image in memory, made square by `data.fit` when rendered.

  Attributes:
    content: bytes of the image file.
    name: name of the image in error messages.
    fit: see `data.fit`.
  """

  content: bytes = dataclasses.field(repr=False)
  name: str
  fit: str = 'pad'

  def render(self, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3].

    Raises:
      UserError: the bytes are not a readable image.
    """
    return to_square(read_image(io.BytesIO(self.content), self.name), size, self.fit)


@dataclasses.dataclass(frozen=True)
class Folder:
  """The image files of a folder as a source, sorted by file name.

  Attributes:
    path: the folder.
    entries: image file, caption and source image file of each record.
    fit: see `data.fit`.
  """

  path: str
  entries: tuple[Names, ...]
  fit: str = 'pad'

  def __len__(self) -> int:
    return len(self.entries)

  def __getitem__(self, index: int) -> Record:
    name, caption, source_name = self.entries[index]
    return Record(
      id=record_id(name),
      caption=caption,
      group=group_of(name),
      split='train',
      image=self._file(name),
      reference=self._file(source_name) if source_name else None,
    )

  def _file(self, name: str) -> File:
    return File(str(Path(self.path) / name), self.fit)

  def stamps(self) -> Iterator[str]:
    """Path, size and modification time of every image file; see StoredSource in records.py."""
    for name, _, source_name in self.entries:
      for path in [self._file(each).path for each in (name, source_name) if each]:
        stat = os.stat(path)
        yield f'{path} {stat.st_size} {stat.st_mtime_ns}'


def record_id(name: str) -> str:
  """The record id of an image file in the folder."""
  return f'folder/{name}'


def group_of(name: str) -> str:
  """The class of an image file: the name of its subfolder; `folder` outside all subfolders."""
  return PurePosixPath(name).parent.name or 'folder'


def open_folder(
  path: str, count: int = 0, fields: FieldSpec = FieldSpec(), record_filter: Filter = KEEP_ALL
) -> Folder:
  """Lists the images and captions of a folder; images are decoded when rendered.

  A `captions.jsonl` in the folder has lines such as `{"file": "fox.png", "caption": "a red fox"}`
  (or `image` and `text`). For edits, `caption` is the instruction and `reference` names the source
  image. Without a `captions.jsonl`, each image needs a text file of the same name. Hidden files are
  ignored.

  Args:
    path: the folder.
    count: use only the first `count` records by file name, and log a warning; 0 for all.
    fields: fields that each record must have. Without captions, text files are optional.
    record_filter: filter that records must pass (see vpe_jax.data.filters for its fields); it also
      says how images become square.

  Raises:
    UserError: the folder is missing or empty, a caption or image is missing, a line or text can't
      be read, no record passes the filter, or a field that the filter needs is missing.
  """
  folder = local_path(path)
  accepted, total = set(), 0
  for names, values, where in find_entries(folder, fields):
    total += 1
    for name in names[::2]:  # image and source image
      _check_file(folder, name, where)
    if record_filter.passes(values, names[1], folder / names[0], where):
      accepted.add(names)
  if not total:
    raise UserError(f'data folder {folder} has no images ({", ".join(sorted(_ENDINGS))})')
  if not accepted:
    raise UserError(
      f'data folder {folder}: none of its {total} records passes data.language and '
      'data.least_text_height; relax them'
    )
  entries = sorted(accepted)
  return Folder(
    str(folder), tuple(entries[: limited_count(len(entries), count, path)]), record_filter.fit
  )


def limited_count(total: int, count: int, path: str) -> int:
  """Number of records used of `total` with `data.examples=count` (0: all); warns if fewer."""
  if not 0 < count < total:
    return total
  logging.warning(
    'data folder %s: using only the first %d of %d images; --config.data.examples=0 uses all',
    path,
    count,
    total,
  )
  return count


def find_entries(folder: Path, fields: FieldSpec) -> Iterator[Entry]:
  """Entries of a folder, in no particular order; opens no image.

  Args:
    folder: see `open_folder`.
    fields: fields that each entry must have. Default names: `file` or `image`; `caption` or `text`;
      `reference`.

  Raises:
    UserError: the folder is missing, an entry lacks a field, or a text can't be read.
  """
  if not folder.is_dir():
    raise UserError(f'data folder {folder} does not exist: folder:PATH needs an existing folder')
  path = folder / _CAPTIONS
  yield from (
    _from_captions_file(folder, path, fields) if path.exists() else _from_text_files(folder, fields)
  )


def _from_captions_file(folder: Path, path: Path, fields: FieldSpec) -> Iterator[Entry]:
  images = [fields.image] if fields.image else ['file', 'image']
  captions = [fields.caption] if fields.caption else ['caption', 'text']
  for number, line in enumerate(read_lines(path), 1):
    if not line.strip():
      continue
    try:
      values = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also for too many digits.
      raise UserError(f'{path} line {number} is not JSON: {error}') from error
    where = f'{path} line {number}'
    name, caption = first_text(values, *images), first_text(values, *captions) or ''
    if name is None:
      raise UserError(f'{where} names no image: add "{images[0]}"')
    if fields.captions and not check_text(caption, where):
      raise UserError(f'{where}: image {name} has no caption: add "{captions[0]}"')
    yield (
      (_within(folder, name, where), caption, _source_name(folder, values, fields, where)),
      values,
      where,
    )


def _source_name(folder: Path, values: Any, fields: FieldSpec, where: str) -> str:
  """File name of the source image of an edit; '' if the records need none."""
  if not fields.references:
    return ''
  field = fields.reference or 'reference'
  if (name := first_text(values, field)) is None:
    raise UserError(f'{where} names no source image: add "{field}"')
  return _within(folder, name, where)


def _within(folder: Path, name: str, where: str) -> str:
  """The normalized name of a file; rejects names outside the folder."""
  path = PurePosixPath(name)
  if path.is_absolute() or '..' in path.parts:
    raise UserError(
      f'{where}: image {_abbreviated(name)} is outside the folder: copy it into {folder}'
    )
  return str(path)


def _check_file(folder: Path, name: str, where: str) -> None:
  """Rejects the name of a missing file; '' stands for no file."""
  try:
    exists = not name or (folder / name).is_file()
  except OSError as error:  # The name is too long.
    raise UserError(
      f'{where}: image {_abbreviated(name)} can not be read ({error.strerror})'
    ) from error
  if not exists:
    raise UserError(f'{where}: image {folder / _abbreviated(name)} does not exist')


def _abbreviated(name: str) -> str:
  return name if len(name) <= _MAX_NAME else f'{name[:_MAX_NAME]}...'


def check_text(text: str, where: str, kind: str = 'caption') -> str:
  """Returns the text if it can be encoded as UTF-8.

  Raises:
    UserError: it can't; the message names `where` and `kind`.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: the {kind} is not valid text ({error.reason}): write it in UTF-8'
    ) from error
  return text


def first_text(values: Any, *names: str) -> str | None:
  """The first of the named fields that holds text; None if none does."""
  texts = [values.get(name) for name in names] if isinstance(values, dict) else []
  return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), None)


def _from_text_files(folder: Path, fields: FieldSpec) -> Iterator[Entry]:
  if fields.references:
    raise UserError(f'data folder {folder} has no {_CAPTIONS}: source images must be named there')
  for image in folder.rglob('*'):
    hidden = any(part.startswith('.') for part in image.relative_to(folder).parts)
    if hidden or image.suffix.lower() not in _ENDINGS or not image.is_file():
      continue
    text = image.with_suffix('.txt')
    caption = ' '.join(read_text(text).split()) if text.is_file() else ''
    if fields.captions and not caption:
      raise UserError(f'image {image} has no caption: write one to {text.name} next to it')
    yield (image.relative_to(folder).as_posix(), caption, ''), {}, f'image {image}'


def first_line(error: Exception) -> str:
  """The first line of an error message; the name of the error type if the message is empty."""
  return next(iter(str(error).splitlines()), '') or type(error).__name__
