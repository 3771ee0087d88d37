"""Inputs of vpe_jax.prepare: images in the order of their places, one after the other.

A place says where a picture is (a name, or file and offset), in plain values. Places are cheap and
come as a stream; reader processes take some of them and read what is there. Kinds of inputs:
folders here, and webdataset, parquet and tfds in vpe_jax.data.formats.
"""

from __future__ import annotations

import dataclasses
import glob
import heapq
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vpe_jax.contracts import UserError
from vpe_jax.data.filters import FIELDS
from vpe_jax.data.formats.array_record import MANIFEST, Content
from vpe_jax.data.formats.folder import Asked, find, group_of, record_id
from vpe_jax.data.formats.tfds import Tfds
from vpe_jax.storage import local_path

Place = Sequence[Any]  # values that JSON knows

_RUN = 200_000  # entries that are sorted in memory; a file is opened for each run of them


@dataclasses.dataclass(frozen=True)
class Found:
  """A picture as it was found.

  Attributes:
    content: of its record.
    values: fields that filters read; several where it was listed several times.
    where: what an error calls it.
  """

  content: Content
  values: tuple[Mapping[str, Any], ...]
  where: str


@dataclasses.dataclass(frozen=True)
class Unusable:
  """A picture that can't be used: the id that it would have, and why."""

  id: str
  reason: str


class Input(Protocol):
  """A data set that is read once; travels to reader processes."""

  def count(self) -> int | None:
    """Number of places, or None where only reading all of them tells."""
    ...

  def places(self, scratch: Path) -> Iterator[Place]:
    """Where the pictures are, in the same order each time.

    Args:
      scratch: folder for files that are needed no more once the iterator is at its end.
    """
    ...

  def read(self, places: Sequence[Place]) -> Iterator[Found | Unusable]:
    """The images at some of the places, one for each."""
    ...


@dataclasses.dataclass(frozen=True)
class FolderInput:
  """A folder as vpe_jax.data.formats.folder reads it, sorted by file name, of any length."""

  path: str
  asked: Asked

  def count(self) -> None:
    """Only reading all of it tells."""

  def places(self, scratch: Path) -> Iterator[Place]:
    """(names, fields of each entry with these names, where) in the order of the folder's source."""
    # One picture without a caption is its own fault, found when it is read.
    asked = dataclasses.replace(self.asked, captions=False)
    entries = (
      (names, {key: values[key] for key in FIELDS if key in values}, where)
      for names, values, where in find(Path(self.path), asked)
    )
    for names, same in itertools.groupby(sort(entries, scratch), key=lambda entry: entry[0]):
      listed = list(same)
      yield names, [values for _, values, _ in listed], listed[0][2]

  def read(self, places: Sequence[Place]) -> Iterator[Found | Unusable]:
    """See Input."""
    for (name, caption, before), values, where in places:
      try:
        image, reference = (
          Path(self.path, each).read_bytes() if each else b'' for each in (name, before)
        )
        content = Content(record_id(name), caption, group_of(name), image, reference)
        yield Found(content, tuple(values), where)
      except (OSError, ValueError) as error:  # A name may be one that no file can have.
        yield Unusable(record_id(name), f'{where}: {error}')


@dataclasses.dataclass(frozen=True)
class TfdsInput:
  """A split of a data set of TensorFlow Datasets, in its order."""

  source: Tfds

  def count(self) -> int:
    """Number of places."""
    return len(self.source)

  def places(self, scratch: Path) -> Iterator[Place]:
    """See Input; nothing of it is looked up."""
    del scratch
    return ((index,) for index in range(len(self.source)))

  def read(self, places: Sequence[Place]) -> Iterator[Found | Unusable]:
    """See Input."""
    for (index,) in places:
      try:
        record = self.source[index]
      except UserError as error:
        yield Unusable(f'tfds/{self.source.split}/{index}', str(error))
        continue
      content = Content(record.id, record.caption, record.group, record.picture.content)
      yield Found(content, ({},), record.picture.name)


def open_folder_input(path: str, asked: Asked) -> FolderInput:
  """A folder of single files.

  Raises:
    UserError: it is prepared already.
  """
  folder = local_path(path)
  if (folder / MANIFEST).exists():
    raise UserError(f'{folder} is prepared already: config.data.source=folder:{folder} reads it')
  return FolderInput(str(folder), asked)


def matching(pattern: str, ending: str) -> dict[str, str]:
  """The files that a pattern or a folder names, each with a name of its own, sorted.

  Args:
    pattern: with `*`, `?` and `[...]`, or a folder, which stands for all files in it.
    ending: of the files in a folder.

  Returns:
    Path -> its name within the folder that all lie in, without the ending.

  Raises:
    UserError: there are none.
  """
  place = local_path(pattern)
  every = place.rglob(f'*{ending}') if place.is_dir() else glob.iglob(str(place), recursive=True)
  paths = sorted(str(path) for path in every if Path(path).is_file())
  if not paths:
    raise UserError(
      f'{pattern} names no files: give a folder with *{ending} files, or a pattern in which * and '
      '? stand for letters'
    )
  root = os.path.commonpath([os.path.dirname(path) or '.' for path in paths])
  return {path: os.path.relpath(path, root).removesuffix(ending) for path in paths}


def sort(entries: Iterable[Place], scratch: Path, run: int = _RUN) -> Iterator[list[Any]]:
  """Entries in the order of their first values, with no more than `run` of them in memory.

  Args:
    entries: tuples of values that JSON knows.
    scratch: folder for sorted runs; each is deleted when the iterator has ended.
    run: entries that are sorted at a time.

  Yields:
    The entries, as lists.
  """
  first = lambda entry: entry[0]
  files: list[Path] = []
  entries = iter(entries)
  while held := sorted(itertools.islice(entries, run), key=first):
    files.append(scratch / f'run-{len(files):05d}.jsonl')
    with files[-1].open('w', encoding='ascii') as file:
      file.writelines(json.dumps(entry) + '\n' for entry in held)
  yield from heapq.merge(*map(_entries, files), key=first)
  for file in files:
    file.unlink()


def _entries(path: Path) -> Iterator[list[Any]]:
  with path.open(encoding='ascii') as file:
    yield from map(json.loads, file)
