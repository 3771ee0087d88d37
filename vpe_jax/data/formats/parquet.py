"""Parquet files, as the Hugging Face hub has them, as an input of vpe_jax.prepare.

A picture is a column of bytes, or of {bytes, path}, of which the path is never opened. Needs
pyarrow (`pip install -e .[prepare]`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpe_jax.contracts import UserError
from vpe_jax.data.filters import FIELDS
from vpe_jax.data.formats.array_record import Content
from vpe_jax.data.formats.folder import FieldSpec
from vpe_jax.data.inputs import RawRecord, Location, UnusableRecord, matching_files

_IMAGES = ('image', 'jpg', 'png', 'img')
_CAPTIONS = ('caption', 'text', 'prompt')
_BATCH = 32  # rows that are decoded at a time
_GROUP = 'parquet'


@dataclasses.dataclass(frozen=True)
class Parquet:
  """Parquet files in the order of their names, rows in the order of the file.

  Attributes:
    names: path -> name of the file in ids.
    groups: rows of each row group of each file.
    image: column of the picture.
    caption: column of the caption; '' for none.
    reference: column of the picture before an edit; '' for none.
    filtered: columns that filters read.
  """

  names: Mapping[str, str]
  groups: tuple[tuple[int, ...], ...]
  image: str
  caption: str
  reference: str
  filtered: tuple[str, ...]

  def count(self) -> int:
    """Number of places."""
    return sum(map(sum, self.groups))

  def places(self, scratch: Path) -> Iterator[Location]:
    """(file, row group, row in the group, row in the file)."""
    del scratch
    for path, groups in zip(self.names, self.groups, strict=True):
      before = 0
      for group, rows in enumerate(groups):
        yield from ((path, group, row, before + row) for row in range(rows))
        before += rows

  def read(self, places: Sequence[Location]) -> Iterator[RawRecord | UnusableRecord]:
    """See Input."""
    pyarrow, _ = _packages()
    for (path, group), same in itertools.groupby(places, key=lambda place: tuple(place[:2])):
      rows = [(row, number) for _, _, row, number in same]
      done, reason = 0, ''
      try:
        for values in self._rows(path, group, rows[0][0], len(rows)):
          yield self._found(path, rows[done][1], values)
          done += 1
      except (OSError, pyarrow.ArrowException) as error:
        reason = f'row group {group} of {path} can not be read ({error})'
      yield from (UnusableRecord(self._id(path, number), reason) for _, number in rows[done:])

  def _id(self, path: str, number: int) -> str:
    return f'{self.names[path]}/{number}'

  def _rows(
    self, path: str, group: int, first: int, count: int
  ) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Values of the columns in consecutive rows of a row group, a few rows in memory."""
    _, parquet = _packages()
    columns = [name for name in (self.image, self.caption, self.reference) if name]
    with parquet.ParquetFile(path) as file:
      batches = file.iter_batches(
        _BATCH, row_groups=[group], columns=[*columns, *self.filtered], use_threads=False
      )
      rows = itertools.chain.from_iterable(
        _values(batch.slice(min(max(0, first - start), batch.num_rows)))
        for start, batch in _placed(batches)
      )
      yield from itertools.islice(rows, count)

  def _found(
    self, path: str, number: int, values: dict[str, Any] | UnicodeDecodeError
  ) -> RawRecord | UnusableRecord:
    """One row as a record."""
    where = f'row {number} of {path}'
    if isinstance(values, UnicodeDecodeError):
      return UnusableRecord(self._id(path, number), f'{where} has text that is not UTF-8')
    images = [_bytes(values[name]) for name in (self.image, self.reference) if name]
    caption = (values[self.caption] or '').strip() if self.caption else ''
    if not all(images):
      return UnusableRecord(self._id(path, number), f'{where} has no bytes of a picture')
    content = Content(self._id(path, number), caption, _GROUP, *images)
    return RawRecord(content, ({name: values[name] for name in self.filtered},), where)


def open_parquet(pattern: str, fields: FieldSpec) -> Parquet:
  """The parquet files that a pattern names, or that lie in a folder; reads their ends alone.

  Args:
    pattern: see vpe_jax.data.inputs.matching_files.
    fields: what pictures need; the usual columns are `image`, `jpg`, `png` or `img`, and `caption`,
      `text` or `prompt`.

  Raises:
    UserError: pyarrow isn't installed, there are no files, or one lacks a column.
  """
  pyarrow, parquet = _packages()
  names = matching_files(pattern, '.parquet')
  groups, columns, filtered = [], None, FIELDS
  for path in names:
    try:
      with parquet.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        groups.append(tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
    except (OSError, pyarrow.ArrowException) as error:
      raise UserError(f'{path} is no parquet file ({error}): get it again') from error
    filtered = tuple(name for name in filtered if name in schema.names)
    columns = columns or _columns(path, schema, fields)
    for name in filter(None, columns):
      if name not in schema.names:
        raise UserError(f'{path} has no column {name}, which {next(iter(names))} has')
  return Parquet(names, tuple(groups), *columns, filtered)


def _columns(path: str, schema: Any, fields: FieldSpec) -> tuple[str, str, str]:
  """The columns of picture, caption and picture before; '' for one that isn't fields for.

  Raises:
    UserError: the file lacks one, or it is of another type.
  """
  kinds = _packages()[0].types
  is_text = lambda kind: kinds.is_string(kind) or kinds.is_large_string(kind)
  is_bytes = lambda kind: kinds.is_binary(kind) or kinds.is_large_binary(kind)
  is_picture = lambda kind: (
    is_bytes(kind)
    or (kinds.is_struct(kind) and any(f.name == 'bytes' and is_bytes(f.type) for f in kind))
  )
  chosen = []
  for needed, given, usual, good, flag in (
    (True, fields.image, _IMAGES, is_picture, 'image'),
    (fields.captions or fields.caption, fields.caption, _CAPTIONS, is_text, 'caption'),
    (fields.references, fields.reference, (), is_picture, 'reference'),
  ):
    names = (given,) if given else usual
    found = [name for name in names if name in schema.names and good(schema.field(name).type)]
    if needed and not found:
      have = ', '.join(f'{field.name} ({field.type})' for field in schema)
      raise UserError(
        f'{path} has no {flag} in a column {" or ".join(names)}: name it with --{flag}, of {have}'
      )
    chosen.append(found[0] if needed else '')
  return tuple(chosen)


def _values(batch: Any) -> list[dict[str, Any] | UnicodeDecodeError]:
  """The rows of a record batch; in the place of one whose text isn't UTF-8, what is wrong."""
  try:
    return batch.to_pylist()
  except UnicodeDecodeError as error:
    if batch.num_rows == 1:
      return [error]
    return [row for i in range(batch.num_rows) for row in _values(batch.slice(i, 1))]


def _placed(batches: Iterator[Any]) -> Iterator[tuple[int, Any]]:
  """(row of its first, batch) of each batch."""
  start = 0
  for batch in batches:
    yield start, batch
    start += batch.num_rows


def _bytes(value: Any) -> bytes:
  """The bytes of a picture's column; none where it has only a path."""
  return (value.get('bytes') if isinstance(value, dict) else value) or b''


def _packages() -> tuple[Any, Any]:
  """pyarrow, and its parquet.

  Raises:
    UserError: it isn't installed.
  """
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f'parquet needs pyarrow ({error}): pip install -e .[prepare]') from error
  return pyarrow, parquet
