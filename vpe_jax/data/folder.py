"""A user's own pictures: a folder of images with `captions.jsonl`, or a `.txt` beside each.

Pictures in subfolders are of the class that their folder is called after; where that is all a model
asks for, they need no captions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from absl import logging

from vpe_jax.contracts import UserError
from vpe_jax.data.filters import EVERYTHING, Filter
from vpe_jax.data.records import Record
from vpe_jax.data.storage import read_text
from vpe_jax.data.transforms import read_image, to_square

_ENDINGS = frozenset({'.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff'})
_CAPTIONS = 'captions.jsonl'
_SHOWN = 80  # letters of a name that an error shows

_Names = tuple[str, str, str]  # file name, caption, file name of the picture before or ''
_Entry = tuple[_Names, Mapping[str, Any], str]  # what a record is made of, other fields, place


@dataclasses.dataclass(frozen=True)
class Asked:
  """What each picture of a folder must come with: a caption, and a picture before."""

  captions: bool = True
  references: bool = False


@dataclasses.dataclass(frozen=True)
class File:
  """A picture in a file, made a square by `data.fit` when drawn."""

  path: str
  fit: str = 'pad'

  def draw(self, size: int) -> np.ndarray:
    """The file's picture as uint8 [size, size, 3].

    Raises:
      UserError: the file can't be read as a picture; names it.
    """
    return to_square(read_image(self.path), size, self.fit)


@dataclasses.dataclass(frozen=True)
class Folder:
  """Captioned image files as a source, sorted by file name."""

  path: str
  entries: tuple[_Names, ...]  # files within the folder
  fit: str = 'pad'

  def __len__(self) -> int:
    return len(self.entries)

  def __getitem__(self, index: int) -> Record:
    name, caption, before = self.entries[index]
    file = lambda name: File(str(Path(self.path) / name), self.fit)
    return Record(
      id=f'folder/{name}',
      caption=caption,
      group=PurePosixPath(name).parent.name or 'folder',
      split='train',
      picture=file(name),
      reference=file(before) if before else None,
    )


def open_folder(
  path: str, count: int = 0, asked: Asked = Asked(), keep: Filter = EVERYTHING
) -> Folder:
  """Finds images and captions; pictures themselves are read when drawn.

  Args:
    path: the folder. A `captions.jsonl` in it has lines such as
      `{"file": "fox.png", "caption": "a red fox"}` (also `image`, `text`; what `keep` reads:
      vpe_jax.data.filters) for pictures within the folder; without one, each image needs a text
      file of the same name beside it. Hidden files are passed over. A line whose caption is an
      instruction names the picture before as its `reference`.
    count: number of records to keep, the first by name, with a warning; 0 for all.
    asked: what pictures need; without captions, an absent `captions.jsonl` asks for no text files.
    keep: which of the records are kept, and how their pictures become squares.

  Raises:
    UserError: the folder is missing or empty, an image has no caption, a text or a line can't be
      read, or the filter finds nothing, or not what it needs.
  """
  folder = Path(path).expanduser()
  if not folder.is_dir():
    raise UserError(f'data folder {folder} does not exist; check --config.data.source=folder:PATH')
  listed = folder / _CAPTIONS
  found = _from_lines(folder, listed, asked) if listed.exists() else _from_texts(folder, asked)
  kept, read = set(), 0
  for names, values, where in found:
    read += 1
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
  if 0 < count < len(entries):
    logging.warning(
      'data folder %s: only the first %d of %d pictures by name are used; '
      '--config.data.examples=0 takes all',
      folder,
      count,
      len(entries),
    )
  return Folder(str(folder), tuple(entries[: count or None]), keep.fit)


def _from_lines(folder: Path, listed: Path, asked: Asked) -> Iterator[_Entry]:
  # Not splitlines(): U+2028 and its like may stand inside JSON.
  for number, line in enumerate(read_text(listed).split('\n'), 1):
    if not line.strip():
      continue
    try:
      values = json.loads(line)
    except (ValueError, RecursionError) as error:  # Too many digits, too many brackets.
      raise UserError(f'{listed} line {number} is not JSON: {error}') from error
    name, caption = _field(values, 'file', 'image'), _field(values, 'caption', 'text')
    if name is None:
      raise UserError(f'{listed} line {number} names no image: give it a "file"')
    if caption is None:
      raise UserError(f'{listed} line {number}: image {name} has no caption; give it a "caption"')
    where = f'{listed} line {number}'
    names = _within(folder, name, where), _valid(caption, where)
    yield (*names, _before(folder, values, where) if asked.references else ''), values, where


def _before(folder: Path, values: Any, where: str) -> str:
  """The name of the picture before an edit."""
  if (name := _field(values, 'reference')) is None:
    raise UserError(f'{where} names no picture before: give it a "reference"')
  return _within(folder, name, where)


def _within(folder: Path, name: str, where: str) -> str:
  """The name of a picture in the folder, in one spelling."""
  path = PurePosixPath(name)
  shown = name if len(name) <= _SHOWN else f'{name[:_SHOWN]}...'
  if path.is_absolute() or '..' in path.parts:
    raise UserError(f'{where}: image {shown} lies outside the folder: copy it into {folder}')
  try:
    found = (folder / path).is_file()
  except OSError as error:  # Its name is longer than names can be.
    raise UserError(f'{where}: image {shown} can not be read ({error.strerror})') from error
  if not found:
    raise UserError(f'{where}: image {folder / shown} does not exist')
  return str(path)


def _valid(caption: str, where: str) -> str:
  try:
    caption.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: the caption is not valid text ({error.reason}): write it in UTF-8'
    ) from error
  return caption


def _field(values: Any, *names: str) -> str | None:
  """The first of the named fields that holds text."""
  found = [values.get(name) for name in names] if isinstance(values, dict) else []
  return next((text.strip() for text in found if isinstance(text, str) and text.strip()), None)


def _from_texts(folder: Path, asked: Asked) -> Iterator[_Entry]:
  if asked.references:
    raise UserError(f'data folder {folder} has no {_CAPTIONS}: only its lines name pictures before')
  for image in folder.rglob('*'):
    hidden = any(part.startswith('.') for part in image.relative_to(folder).parts)
    if hidden or image.suffix.lower() not in _ENDINGS or not image.is_file():
      continue
    text = image.with_suffix('.txt')
    caption = ' '.join(read_text(text).split()) if text.is_file() else ''
    if asked.captions and not caption:
      raise UserError(f'image {image} has no caption: write one to {text.name} beside it')
    yield (image.relative_to(folder).as_posix(), caption, ''), {}, f'image {image}'
