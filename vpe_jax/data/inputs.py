"""Inputs of vpe_jax.prepare: raw records, read one after the other.

A location addresses one record with JSON values, such as a file name, or a file and an offset.
Locations are small and are streamed; each reader process gets some of them, and reads the records
there. Folder and TFDS inputs are defined here, WebDataset and Parquet inputs in
vpe_jax.data.formats.
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
from vpe_jax.data.formats.entries import FieldSpec, find_entries
from vpe_jax.data.formats.folder import group_of, record_id
from vpe_jax.data.formats.tfds import Tfds
from vpe_jax.data.records import BadRecord, caption_fields
from vpe_jax.data.transforms import DECODING, Decoding
from vpe_jax.storage import files_below, local_path

Location = Sequence[Any]  # JSON values

_RUN = 200_000  # entries per sorted run in memory; the merge opens one file per run


@dataclasses.dataclass(frozen=True)
class RawRecord:
  """A record of an input, before filters.

  Attributes:
    content: content of the prepared record.
    values: fields that filters read, one mapping for each time that the input lists the record.
    where: location of the record, for error messages.
  """

  content: Content
  values: tuple[Mapping[str, Any], ...]
  where: str


@dataclasses.dataclass(frozen=True)
class UnusableRecord:
  """A record that can't be used: its id and the reason."""

  id: str
  reason: str


class Input(Protocol):
  """A data set to prepare; pickled to reader processes."""

  def count(self) -> int | None:
    """Number of locations; None if counting them requires reading the input."""
    ...

  def locations(self, scratch: Path) -> Iterator[Location]:
    """Locations of all records, in the same order each time.

    Args:
      scratch: folder for temporary files, which are deleted when the iterator is exhausted.
    """
    ...

  def read(self, locations: Sequence[Location]) -> Iterator[RawRecord | UnusableRecord]:
    """Reads the records at some of the locations; yields one for each."""
    ...


@dataclasses.dataclass(frozen=True)
class FolderInput:
  """A folder as vpe_jax.data.formats.folder reads it, sorted by file name.

  Sorting is external, so the folder may have more entries than fit into memory.
  """

  path: str
  fields: FieldSpec
  decoding: Decoding = Decoding()

  def count(self) -> None:
    """None: counting requires reading the folder."""

  def locations(self, scratch: Path) -> Iterator[Location]:
    """(names, filter fields of each entry with these names, where, reason), sorted; see Entry."""
    # Captions are optional here: preparing reports a missing one with the cure of its own flags.
    fields = dataclasses.replace(self.fields, captions=False)
    entries = (
      (names, {key: values[key] for key in FIELDS if key in values}, where, reason)
      for names, values, where, reason in find_entries(Path(self.path), fields)
    )
    for names, group in itertools.groupby(sort(entries, scratch), key=lambda entry: entry[0]):
      duplicates = list(group)
      yield names, [values for _, values, _, _ in duplicates], *duplicates[0][2:]

  def read(self, locations: Sequence[Location]) -> Iterator[RawRecord | UnusableRecord]:
    """See Input."""
    for (name, captions, source_name), values, where, reason in locations:
      try:
        if reason:
          raise BadRecord(reason)
        files = {'image': self._read(name), 'reference': self._read(source_name)}
        texts = caption_fields(captions)
        content = Content(id=record_id(name), group=group_of(name), **texts, **files)
        yield RawRecord(content, tuple(values), where)
      except BadRecord as error:
        yield UnusableRecord(name if reason else record_id(name), str(error))
      except (OSError, ValueError) as error:  # ValueError: not a valid file name.
        yield UnusableRecord(record_id(name), f'{where}: {error}')

  def _read(self, name: str) -> bytes:
    """The content of a file, if it is not too large; b'' for the name ''."""
    if not name:
      return b''
    path = Path(self.path, name)
    if path.exists() and not path.is_file():  # Reading a pipe or a device may never end.
      raise BadRecord(f'image {path} is no regular file')
    self.decoding.check_bytes(path.stat().st_size, str(path))
    return path.read_bytes()


@dataclasses.dataclass(frozen=True)
class TfdsInput:
  """A split of a data set of TensorFlow Datasets, in stored order."""

  source: Tfds

  def count(self) -> int:
    """Number of records."""
    return len(self.source)

  def locations(self, scratch: Path) -> Iterator[Location]:
    """Indices of the records; nothing is read."""
    del scratch
    return ((index,) for index in range(len(self.source)))

  def read(self, locations: Sequence[Location]) -> Iterator[RawRecord | UnusableRecord]:
    """See Input."""
    for (index,) in locations:
      try:
        record = self.source[index]
      except UserError as error:
        yield UnusableRecord(f'tfds/{self.source.split}/{index}', str(error))
        continue
      content = Content(record.id, record.caption, record.group, record.image.content)
      yield RawRecord(content, ({},), record.image.name)


def open_folder_input(path: str, fields: FieldSpec, decoding: Decoding = DECODING) -> FolderInput:
  """A folder of image files as an input.

  Raises:
    UserError: the folder is already prepared.
  """
  folder = local_path(path)
  if (folder / MANIFEST).exists():
    raise UserError(f'{folder} is already prepared: config.data.source=folder:{folder} reads it')
  return FolderInput(str(folder), fields, decoding)


def matching_files(pattern: str, ending: str) -> dict[str, str]:
  """Files that match a pattern, or all files of a folder, sorted by path.

  Args:
    pattern: path with `*`, `?` and `[...]`, or a folder.
    ending: file name ending that selects the files of a folder.

  Returns:
    Path of each file -> its unique name: the path below the common folder, without the ending.

  Raises:
    UserError: no file matches.
  """
  path = local_path(pattern)
  if path.is_dir():
    matches = (str(file) for file in files_below(path) if file.name.endswith(ending))
  else:
    matches = glob.iglob(str(path), recursive=True)
  paths = sorted(match for match in matches if os.path.isfile(match))
  if not paths:
    raise UserError(
      f'{pattern} matches no files: give a folder with *{ending} files, or a pattern with * and ?'
    )
  root = os.path.commonpath([os.path.dirname(path) or '.' for path in paths])
  return {path: os.path.relpath(path, root).removesuffix(ending) for path in paths}


def sort(entries: Iterable[Location], scratch: Path, run: int = _RUN) -> Iterator[list[Any]]:
  """External merge sort by the first value of each entry.

  Args:
    entries: tuples of JSON values.
    scratch: folder for files of sorted runs, which are deleted when the iterator is exhausted.
    run: number of entries that are sorted in memory at a time.

  Yields:
    The entries, as lists.
  """
  first = lambda entry: entry[0]
  files: list[Path] = []
  entries = iter(entries)
  while batch := sorted(itertools.islice(entries, run), key=first):
    files.append(scratch / f'run-{len(files):05d}.jsonl')
    with files[-1].open('w', encoding='ascii') as file:
      file.writelines(json.dumps(entry) + '\n' for entry in batch)
  yield from heapq.merge(*map(_entries, files), key=first)
  for file in files:
    file.unlink()


def _entries(path: Path) -> Iterator[list[Any]]:
  with path.open(encoding='ascii') as file:
    yield from map(json.loads, file)
