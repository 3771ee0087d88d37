"""Parquet files, as on the Hugging Face hub, as an input of vpe_jax.prepare.

An image column holds bytes, or {bytes, path}; paths are never opened. Needs pyarrow
(`pip install -e .[prepare]`).
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
from vpe_jax.data.formats.entries import FieldSpec, captions_of
from vpe_jax.data.inputs import Location, RawRecord, UnusableRecord, matching_files
from vpe_jax.data.records import BadRecord, caption_fields
from vpe_jax.data.transforms import DECODING, Decoding

_IMAGES = ('image', 'jpg', 'png', 'img')
_CAPTIONS = ('caption', 'text', 'prompt')
_BATCH = 32  # table rows that are decoded at a time
_GROUP = 'parquet'


@dataclasses.dataclass(frozen=True)
class Parquet:
  """Parquet files in the order of their names.

  Attributes:
    names: path -> name of the file in record ids.
    groups: number of table rows in each row group of each file.
    image: image column.
    caption: caption column, of texts or of lists of texts; '' for none.
    reference: column of the source image of an edit; '' for none.
    filter_columns: columns that filters read.
    decoding: limits of the images.
  """

  names: Mapping[str, str]
  groups: tuple[tuple[int, ...], ...]
  image: str
  caption: str
  reference: str
  filter_columns: tuple[str, ...]
  decoding: Decoding = Decoding()

  def count(self) -> int:
    """Number of table rows."""
    return sum(map(sum, self.groups))

  def locations(self, scratch: Path) -> Iterator[Location]:
    """(file, row group, row in the group, row in the file)."""
    del scratch
    for path, groups in zip(self.names, self.groups, strict=True):
      start = 0
      for group, rows in enumerate(groups):
        yield from ((path, group, row, start + row) for row in range(rows))
        start += rows

  def read(self, locations: Sequence[Location]) -> Iterator[RawRecord | UnusableRecord]:
    """See Input."""
    pyarrow, _ = _packages()
    for (path, group), rows_of_group in itertools.groupby(
      locations, key=lambda place: tuple(place[:2])
    ):
      rows = [(row, number) for _, _, row, number in rows_of_group]
      done, reason = 0, f'{path} changed: row group {group} has fewer rows than before'
      try:
        for values in self._rows(path, group, rows[0][0], len(rows)):
          yield self._record(path, rows[done][1], values)
          done += 1
      except (OSError, pyarrow.ArrowException) as error:
        reason = f'row group {group} of {path} can not be read ({error})'
      yield from (UnusableRecord(self._id(path, number), reason) for _, number in rows[done:])

  def _id(self, path: str, number: int) -> str:
    return f'{self.names[path]}/{number}'

  def _rows(
    self, path: str, group: int, first: int, count: int
  ) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Column values of consecutive rows of a row group; holds only a few rows in memory."""
    _, parquet = _packages()
    columns = [name for name in (self.image, self.caption, self.reference) if name]
    with parquet.ParquetFile(path) as file:
      batches = file.iter_batches(
        _BATCH, row_groups=[group], columns=[*columns, *self.filter_columns], use_threads=False
      )
      rows = itertools.chain.from_iterable(
        _values(batch.slice(min(max(0, first - start), batch.num_rows)))
        for start, batch in _with_start(batches)
      )
      yield from itertools.islice(rows, count)

  def _record(
    self, path: str, number: int, values: dict[str, Any] | UnicodeDecodeError
  ) -> RawRecord | UnusableRecord:
    """Converts a table row to a record."""
    where = f'row {number} of {path}'
    if isinstance(values, UnicodeDecodeError):
      return UnusableRecord(self._id(path, number), f'{where} has text that is not UTF-8')
    images = {
      field: _image_bytes(values[name])
      for field, name in (('image', self.image), ('reference', self.reference))
      if name
    }
    try:
      if not all(images.values()):
        raise BadRecord(f'{where} has no image bytes')
      for content in images.values():
        self.decoding.check_bytes(len(content), f'in {where}')
      captions = captions_of(values, where, self.caption) if self.caption else ()
    except BadRecord as error:
      return UnusableRecord(self._id(path, number), str(error))
    texts = caption_fields(captions)
    content = Content(id=self._id(path, number), group=_GROUP, **texts, **images)
    return RawRecord(content, ({name: values[name] for name in self.filter_columns},), where)


def open_parquet(pattern: str, fields: FieldSpec, decoding: Decoding = DECODING) -> Parquet:
  """Opens the parquet files that match a pattern, or those of a folder; reads only their footers.

  Args:
    pattern: see vpe_jax.data.inputs.matching_files.
    fields: fields that each record must have. Default columns: `image`, `jpg`, `png` or `img`;
      `caption`, `text` or `prompt`.
    decoding: limits of the images.

  Raises:
    UserError: pyarrow isn't installed, no file matches, a file lacks a column, or the files differ
      in the type of one.
  """
  pyarrow, parquet = _packages()
  names = matching_files(pattern, '.parquet')
  groups, columns, filter_columns = [], None, FIELDS
  for path in names:
    try:
      with parquet.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        groups.append(tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
    except (OSError, pyarrow.ArrowException) as error:
      raise UserError(f'{path} is not a parquet file ({error}): download it again') from error
    filter_columns = tuple(name for name in filter_columns if name in schema.names)
    if columns is None:
      columns, first = _columns(path, schema, fields), (path, schema)
    _check_same_types(path, schema, *first, columns)
  return Parquet(names, tuple(groups), *columns, filter_columns, decoding)


def _check_same_types(
  path: str, schema: Any, first_path: str, first_schema: Any, columns: tuple[str, ...]
) -> None:
  """Raises UserError if a file lacks a column of the first file, or has another kind of values."""
  for name in filter(None, columns):
    if name not in schema.names:
      raise UserError(f'{path} has no column {name}, which {first_path} has')
    kind, expected = schema.field(name).type, first_schema.field(name).type
    if (_is_text(kind), _is_image(kind)) != (_is_text(expected), _is_image(expected)):
      raise UserError(
        f'column {name} is {kind} in {path} and {expected} in {first_path}: write both as '
        f'{expected}'
      )


def _is_text(kind: Any) -> bool:
  """Whether values of a column type are text or lists of texts, also as pandas' categoricals."""
  types = _packages()[0].types
  if types.is_dictionary(kind) or _is_list(kind):
    return _is_text(kind.value_type)
  return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
  types = _packages()[0].types
  kinds = ('list', 'large_list', 'fixed_size_list', 'list_view', 'large_list_view')
  return any(getattr(types, f'is_{name}')(kind) for name in kinds)


def _is_image(kind: Any) -> bool:
  """Whether values of a column type are image bytes, alone or in a struct's field `bytes`."""
  types = _packages()[0].types
  if types.is_struct(kind):
    return any(field.name == 'bytes' and _is_image(field.type) for field in kind)
  return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _columns(path: str, schema: Any, fields: FieldSpec) -> tuple[str, str, str]:
  """The columns of image, caption and source image; '' for a column that is not required.

  Raises:
    UserError: a column is missing, has the wrong type, or shares its name with another one.
  """
  selected = []
  for required, name, defaults, has_type, flag in (
    (True, fields.image, _IMAGES, _is_image, 'image'),
    (fields.captions or fields.caption, fields.caption, _CAPTIONS, _is_text, 'caption'),
    (fields.references, fields.reference, (), _is_image, 'reference'),
  ):
    names = (name,) if name else defaults
    if repeated := [n for n in names if schema.names.count(n) > 1]:
      raise UserError(f'{path} has several columns {repeated[0]}: rename all but one')
    matches = [n for n in names if n in schema.names and has_type(schema.field(n).type)]
    if required and not matches:
      columns = ', '.join(f'{field.name} ({field.type})' for field in schema)
      raise UserError(
        f'{path} has no {flag} column {" or ".join(names)}: set --{flag} to one of {columns}'
      )
    selected.append(matches[0] if required else '')
  return tuple(selected)


def _values(batch: Any) -> list[dict[str, Any] | UnicodeDecodeError]:
  """The rows of a record batch; an error in place of each row whose text isn't UTF-8."""
  try:
    return batch.to_pylist()
  except UnicodeDecodeError as error:
    if batch.num_rows == 1:
      return [error]
    return [row for i in range(batch.num_rows) for row in _values(batch.slice(i, 1))]


def _with_start(batches: Iterator[Any]) -> Iterator[tuple[int, Any]]:
  """(index of the first row, batch) of each batch."""
  start = 0
  for batch in batches:
    yield start, batch
    start += batch.num_rows


def _image_bytes(value: Any) -> bytes:
  """The image bytes in a value of an image column; empty if the value has only a path."""
  return (value.get('bytes') if isinstance(value, dict) else value) or b''


def _packages() -> tuple[Any, Any]:
  """The modules pyarrow and pyarrow.parquet.

  Raises:
    UserError: pyarrow isn't installed.
  """
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f'parquet needs pyarrow ({error}): pip install -e .[prepare]') from error
  return pyarrow, parquet
