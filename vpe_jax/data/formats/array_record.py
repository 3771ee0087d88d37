"""A prepared folder: pictures and captions of any number in a few files, as records to draw from.

`python -m vpe_jax.prepare` writes it and vpe_jax.data.preparing says how. The folder holds shards
in ArrayRecord format and a manifest, `prepared.json`, which is written last. A record is a msgpack
map of plain values (`Content`), with the bytes of the picture's file. Nothing that is read is run.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from vpe_jax.contracts import UserError
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats.folder import FieldSpec, Bytes, first_of, open_folder
from vpe_jax.data.records import Record, StoredSource
from vpe_jax.storage import checksum, local

MANIFEST = 'prepared.json'
FORMAT = 1  # of manifest and records
# Each record is a chunk of its own, so that reading one reads no other. Pictures don't compress.
_WRITER_OPTIONS = 'group_size:1,uncompressed'
_OPEN = 16_384  # shards that a process keeps open, if the system lets it
_OTHERS = 512  # files that it opens besides
_CURE = 'copy it again from where it was prepared, or prepare the folder again'


@dataclasses.dataclass(frozen=True)
class Content:
  """Content of a prepared record.

  Attributes:
    id: unique within the folder.
    caption: '' where there is none.
    group: the class.
    image: bytes of the picture's file.
    reference: bytes of the picture before an edit; empty where there is none.
  """

  id: str
  caption: str
  group: str
  image: bytes
  reference: bytes = b''


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of a prepared folder: its name, records, bytes and CRC-32."""

  file: str
  records: int
  bytes: int
  crc32: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Manifest of a prepared folder.

  Attributes:
    shards: its files, in the order of the records.
    captions: whether every record has a caption.
    references: whether every record has a picture before an edit.
    language: of the records that were kept; see vpe_jax.data.filters for this and the next three.
    least_text_height: of the records that were kept.
    image_size: side of the square that `least_text_height` is measured in.
    fit: how pictures become that square.
    settings: all that it was prepared with, by the names of the command's flags.
    left_out: pictures of the input that filters left out.
    skipped: pictures of the input that could not be used.
    format: FORMAT of the library that wrote it.
  """

  shards: tuple[Shard, ...]
  captions: bool
  references: bool
  language: str = ''
  least_text_height: int = 0
  image_size: int = 0
  fit: str = 'pad'
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  left_out: int = 0
  skipped: int = 0
  format: int = FORMAT

  @property
  def count(self) -> int:
    """Number of records."""
    return sum(shard.records for shard in self.shards)

  def to_json(self) -> str:
    """The content of its file."""
    return json.dumps(dataclasses.asdict(self), indent=1)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared folder as a source; holds its shards' names and no more, wherever it travels.

  Attributes:
    path: the folder.
    shards: its files.
    count: records that are used, the first ones.
    fit: how a picture becomes a square.
    references: whether records show their pictures before.
    digest: of the manifest.
  """

  path: str
  shards: tuple[Shard, ...]
  count: int
  fit: str
  references: bool
  digest: str

  @functools.cached_property
  def _ends(self) -> list[int]:
    """Index after each shard's last record."""
    return list(itertools.accumulate(shard.records for shard in self.shards))

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    """Reads one record, at any place.

    Raises:
      UserError: it can't be read; names its shard and its place there.
    """
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count} in {self.path}')
    number = bisect.bisect_right(self._ends, index)
    shard = self.shards[number]
    found = _read(self.path, shard, index - self._ends[number] + shard.records)
    picture = lambda content: Bytes(content, f'{found.id} in {self.path}/{shard.file}', self.fit)
    return Record(
      id=found.id,
      caption=found.caption,
      group=found.group,
      split='train',
      image=picture(found.image),
      reference=picture(found.reference) if self.references else None,
    )

  def stamps(self) -> Iterator[str]:
    """The manifest, which has a checksum of each shard; see vpe_jax.data.records.StoredSource."""
    yield self.digest


def open_image_folder(path: str, count: int, fields: FieldSpec, keep: Filter) -> StoredSource:
  """A user's own pictures: a prepared folder, known by its manifest, or one of single files.

  Args:
    path: the folder.
    count: number of records to keep, the first ones, with a warning; 0 for all.
    fields: what pictures need.
    keep: which of the records are kept: a prepared folder must have been prepared so.

  Raises:
    UserError: the folder can't be read, or lacks what is fields for.
  """
  folder = local(path)
  if not (folder / MANIFEST).exists():
    return open_folder(path, count, fields, keep)
  manifest, digest = read_manifest(folder)
  _check_asked(folder, manifest, fields, keep)
  for shard in manifest.shards:
    check_size(folder, shard)
  kept = first_of(manifest.count, count, path)
  return Prepared(str(folder), manifest.shards, kept, keep.fit, fields.references, digest)


def read_manifest(folder: Path) -> tuple[Manifest, str]:
  """The manifest of a prepared folder, and a digest of it.

  Raises:
    UserError: it can't be read, or is of another format.
  """
  path = folder / MANIFEST
  try:
    content = path.read_bytes()
    values = json.loads(content)
    found = values.get('format')
    if found == FORMAT:
      shards = tuple(Shard(**shard) for shard in values.pop('shards'))
      manifest = Manifest(shards, **values)
      if not manifest.count or any(Path(shard.file).name != shard.file for shard in shards):
        raise ValueError('no records, or files of another folder')
  except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
    raise UserError(f'{path} is damaged ({error}): {_CURE}') from error
  if found != FORMAT:
    raise UserError(
      f'{path} is of format {found}, and this version reads {FORMAT}: prepare the folder again, or '
      'use the version that wrote it'
    )
  return manifest, hashlib.blake2b(content, digest_size=16).hexdigest()


def check_size(folder: Path, shard: Shard) -> None:
  """Refuses a shard that is missing or of another size.

  Raises:
    UserError: names it.
  """
  path = folder / shard.file
  try:
    size = path.stat().st_size
  except OSError as error:
    raise UserError(f'{path} can not be read ({error.strerror}): {_CURE}') from error
  if size != shard.bytes:
    raise UserError(f'{path} has {size:,} bytes instead of {shard.bytes:,}: {_CURE}')


def verify(folder: Path) -> Iterator[Shard]:
  """Checks every byte of a prepared folder; yields each shard that is good.

  Raises:
    UserError: a shard is not as it was written; names it.
  """
  for shard in read_manifest(folder)[0].shards:
    check_size(folder, shard)
    if checksum(folder / shard.file) != shard.crc32:
      raise UserError(f'{folder / shard.file} is damaged (its checksum is another): {_CURE}')
    yield shard


def _check_asked(folder: Path, manifest: Manifest, fields: FieldSpec, keep: Filter) -> None:
  """Refuses a folder that was prepared for something else.

  Raises:
    UserError: names what it lacks.
  """
  for name, has, wants in (
    ('captions', manifest.captions, fields.captions),
    ('pictures before an edit', manifest.references, fields.references),
  ):
    if wants and not has:
      raise UserError(
        f'{folder} was prepared without {name}, which this config needs: prepare it again (python '
        '-m vpe_jax.prepare --help)'
      )
  said = {'language': manifest.language, 'least_text_height': manifest.least_text_height}
  wanted = {'language': keep.language, 'least_text_height': keep.least_text_height}
  if said['least_text_height'] or wanted['least_text_height']:
    said |= {'image_size': manifest.image_size, 'fit': manifest.fit}
    wanted |= {'image_size': keep.size, 'fit': keep.fit}
  if different := [name for name in said if said[name] != wanted[name]]:
    words = ', '.join(
      f'{name}={said[name]!r} (data.{name} is {wanted[name]!r})' for name in different
    )
    raise UserError(
      f'{folder} was prepared with {words}: its records were chosen then; prepare it again, or set '
      'the config to that'
    )


class Writer(contextlib.AbstractContextManager):
  """Writes a shard, record by record; its end is written where the block ends.

  Attributes:
    records: how many were written.
  """

  def __init__(self, path: Path):
    self.records = 0
    self._path = str(path)
    with self._saying():
      self._writer = ArrayRecordWriter(self._path, _WRITER_OPTIONS)

  def write(self, record: Content) -> None:
    """Adds a record.

    Raises:
      OSError: the file can't be written; so does the end of the block.
    """
    with self._saying():
      self._writer.write(msgpack.packb(dataclasses.asdict(record)))
    self.records += 1

  def __exit__(self, *_: Any) -> None:
    with self._saying():
      self._writer.close()

  @contextlib.contextmanager
  def _saying(self) -> Iterator[None]:
    """Says as Python does what array_record says in the words of its C++."""
    try:
      yield
    except RuntimeError as error:
      full = os.strerror(errno.ENOSPC) in str(error)
      said = os.strerror(errno.ENOSPC) if full else _first_line(error)
      raise OSError(errno.ENOSPC if full else errno.EIO, said, self._path) from error


def _read(folder: str, shard: Shard, row: int) -> Content:
  """Record number `row` of a shard."""
  path = os.path.join(folder, shard.file)
  try:
    content = _readers(os.getpid())(path, shard.records)[row]
    return Content(**_plain(msgpack.unpackb(content)))
  except Exception as error:  # array_record raises what its C++ says; a damaged map is of any kind.
    raise UserError(
      f'record {row} of {path} can not be read ({_first_line(error)}): {_CURE}'
    ) from error


def _plain(values: Any) -> dict[str, Any]:
  """A record's map, if its values are of their types."""
  for field in dataclasses.fields(Content):
    kind = bytes if field.type == 'bytes' else str
    if not isinstance(values[field.name], kind):
      raise ValueError(f'{field.name} is no {kind.__name__}')
  return values


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), '') or type(error).__name__


@dataclasses.dataclass(frozen=True)
class _WholeFile:
  """All of a file, as array_record is told what to read: then it needn't open it to count."""

  filename: str
  take: int
  examples_in_shard: int
  skip: int = 0


@functools.cache
def _readers(process: int) -> Callable[[str, int], ArrayRecordDataSource]:
  """Opens shards, by path and records; those that weren't read for the longest time are closed.

  Each process opens its own: a child can't share threads and files of the process that made it.
  """
  del process
  return functools.lru_cache(_most_open())(
    lambda path, records: ArrayRecordDataSource([_WholeFile(path, records, records)])
  )


def _most_open() -> int:
  """How many shards this process may hold open; asks the system for more than the usual 1,024."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = _OPEN + _OTHERS
  most = most if hard == resource.RLIM_INFINITY else min(most, hard)
  if soft != resource.RLIM_INFINITY and soft < most:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  return max(1, most - _OTHERS)
