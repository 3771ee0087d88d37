"""Prepared folders: any number of images and captions in a few ArrayRecord files.

`python -m vpe_jax.prepare` writes them (vpe_jax.data.preparing). A prepared folder holds shards in
ArrayRecord format and a manifest, `prepared.json`, which is written last. A record is a msgpack map
of plain values (`Content`), including the bytes of the image file. Reading never executes code from
the files.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from vpe_jax.contracts import UserError
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats.entries import FieldSpec, first_line
from vpe_jax.data.formats.folder import Bytes, ReadOptions, limited_count, open_folder
from vpe_jax.data.held_out import part_of
from vpe_jax.data.records import BadRecord, HashedSource, Record, StoredSource, digest_of
from vpe_jax.data.transforms import Decoding
from vpe_jax.storage import AnyPath, checksum, local_path

MANIFEST = 'prepared.json'
HASHES = 'hashes.u64'  # hash of the image files of each record, little-endian
FORMAT = 2  # version of the format of manifest and records
_READABLE = (1, 2)  # In format 1, records have one caption.
# One record per chunk, so that random access reads no other record. Images are already compressed.
_WRITER_OPTIONS = 'group_size:1,uncompressed'
_MAX_OPEN_SHARDS = 16_384  # per process, if the system allows it
_OTHER_FILES = 512  # file descriptors reserved for other files
_CURE = 'copy it again from where it was prepared, or prepare the folder again'


@dataclasses.dataclass(frozen=True)
class Content:
  """Content of a prepared record.

  Attributes:
    id: unique within the folder.
    caption: '' if there is none.
    group: class name.
    image: bytes of the image file.
    reference: bytes of the source image file of an edit; empty if there is none.
    captions: all captions if there are several; `caption` is the first.
  """

  id: str
  caption: str
  group: str
  image: bytes
  reference: bytes = b''
  captions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shard:
  """A shard of a prepared folder: file name, number of records, size in bytes, CRC-32."""

  file: str
  records: int
  bytes: int
  crc32: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Manifest of a prepared folder.

  Attributes:
    shards: the files, in the order of the records.
    captions: whether every record has a caption.
    references: whether every record has a source image (edits).
    language: filter that the records passed; see vpe_jax.data.filters for this and the next three.
    least_text_height: filter that the records passed.
    image_size: side of the square in which `least_text_height` is measured.
    fit: how images become square.
    settings: all settings of vpe_jax.prepare, by the names of its flags.
    left_out: number of input records that did not pass the filters.
    skipped: number of unusable input records.
    hashes_crc32: CRC-32 of the file HASHES; None in a folder of format 1, which has no such file.
    format: FORMAT of the library that wrote the folder.
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
  hashes_crc32: int | None = None
  format: int = FORMAT

  @property
  def count(self) -> int:
    """Number of records."""
    return sum(shard.records for shard in self.shards)

  def to_json(self) -> str:
    """The content of the manifest file."""
    return json.dumps(dataclasses.asdict(self), indent=1)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared folder as a source; cheap to pickle, as it holds only the names of its shards.

  Attributes:
    path: the folder.
    shards: the files.
    count: only the first `count` records are used.
    decoding: how image files become arrays.
    references: whether records have source images (edits).
    digest: hash of the manifest.
  """

  path: str
  shards: tuple[Shard, ...]
  count: int
  decoding: Decoding
  references: bool
  digest: str

  @functools.cached_property
  def _ends(self) -> list[int]:
    """Index after each shard's last record."""
    return list(itertools.accumulate(shard.records for shard in self.shards))

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    """Reads one record.

    Raises:
      BadRecord: the record can't be read; the message names its shard and index.
    """
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count} in {self.path}')
    number = bisect.bisect_right(self._ends, index)
    shard = self.shards[number]
    content = _read(self.path, shard, index - self._ends[number] + shard.records)
    name = f'{content.id} in {self.path}/{shard.file}'
    return Record(
      id=content.id,
      caption=content.caption,
      group=content.group,
      split='train',
      image=Bytes(content.image, name, self.decoding),
      reference=Bytes(content.reference, name, self.decoding) if self.references else None,
      captions=content.captions,
    )

  def stamps(self) -> Iterator[str]:
    """The digest of the manifest, which contains a checksum of each shard; see StoredSource."""
    yield self.digest

  def hashes(self) -> np.ndarray:
    """A hash of the image files of each record; see HashedSource."""
    path = os.path.join(self.path, HASHES)
    total = sum(shard.records for shard in self.shards)
    hashes = np.fromfile(path, '<u8') if os.path.exists(path) else np.zeros(0)
    if len(hashes) != total:
      raise UserError(
        f'{path} does not have the hashes of {total:,} images, which data.held_out needs: prepare '
        'the folder again'
      )
    return hashes[: self.count]

  def digests(self) -> Mapping[str, str]:
    """The digest of the manifest; see StoredSource."""
    return {'images and captions': digest_of(len(self), self.digest)}


def open_image_folder(path: str, options: ReadOptions) -> StoredSource:
  """The records of a folder, or the part of them that `options.split` names; see _open_whole."""
  return part_of(_open_whole(path, options), options.held_out, options.split, path)


def _open_whole(path: str, options: ReadOptions) -> HashedSource:
  """Opens a folder of user images: a prepared folder if it has a manifest, else image files.

  Args:
    path: the folder.
    options: how records are read. A prepared folder must have been prepared with the same filter.

  Raises:
    UserError: the folder can't be read, or lacks required fields.
  """
  folder = local_path(path)
  if not (folder / MANIFEST).exists():
    return open_folder(path, options)
  manifest, digest = read_manifest(folder)
  _check_requirements(folder, manifest, options.fields, options.record_filter)
  for shard in manifest.shards:
    _check_size(folder, shard)
  used = limited_count(manifest.count, options.count, path)
  references = options.fields.references
  return Prepared(str(folder), manifest.shards, used, options.decoding, references, digest)


def read_manifest(folder: Path) -> tuple[Manifest, str]:
  """The manifest of a prepared folder, and its digest.

  Raises:
    UserError: the manifest can't be read, or has another format; or the folder was never prepared.
  """
  path = folder / MANIFEST
  if not path.exists():
    kind = 'was not prepared, or not to its end' if folder.is_dir() else 'does not exist'
    raise UserError(
      f'{folder} {kind}: python -m vpe_jax.prepare --source=... --to={folder} prepares it'
    )
  try:
    content = path.read_bytes()
    values = json.loads(content)
    version = values.get('format')
    if version in _READABLE:
      shards = tuple(Shard(**shard) for shard in values.pop('shards'))
      manifest = Manifest(shards, **values)
      if not manifest.count or any(Path(shard.file).name != shard.file for shard in shards):
        raise ValueError('no records, or files of another folder')
  except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
    raise UserError(f'{path} is damaged ({error}): {_CURE}') from error
  if version not in _READABLE:
    raise UserError(
      f'{path} has format {version}, and this version reads up to {FORMAT}: prepare the '
      'folder again, or use the version that wrote it'
    )
  return manifest, hashlib.blake2b(content, digest_size=16).hexdigest()


def _check_size(folder: Path, shard: Shard) -> None:
  """Rejects a shard that is missing or has another size than the manifest says.

  Raises:
    UserError: names the shard.
  """
  path = folder / shard.file
  try:
    size = path.stat().st_size
  except OSError as error:
    raise UserError(f'{path} can not be read ({error.strerror}): {_CURE}') from error
  if size != shard.bytes:
    raise UserError(f'{path} has {size:,} bytes instead of {shard.bytes:,}: {_CURE}')


def verify(path: AnyPath) -> Iterator[Shard]:
  """Verifies the checksum of each shard of a prepared folder; yields each intact shard.

  Raises:
    UserError: a file is missing or damaged; names it.
  """
  folder = local_path(path)
  manifest, _ = read_manifest(folder)
  expected = manifest.hashes_crc32
  if expected is not None and not (folder / HASHES).is_file():
    raise UserError(f'{folder / HASHES} is missing: {_CURE}')
  if expected is not None and checksum(folder / HASHES) != expected:
    raise UserError(f'{folder / HASHES} is damaged (wrong checksum): {_CURE}')
  for shard in manifest.shards:
    _check_size(folder, shard)
    if checksum(folder / shard.file) != shard.crc32:
      raise UserError(f'{folder / shard.file} is damaged (wrong checksum): {_CURE}')
    yield shard


def _check_requirements(
  folder: Path, manifest: Manifest, fields: FieldSpec, record_filter: Filter
) -> None:
  """Rejects a folder that lacks required fields or was prepared with other filters.

  Raises:
    UserError: names the missing or different settings.
  """
  for name, exists, required in (
    ('captions', manifest.captions, fields.captions),
    ('source images', manifest.references, fields.references),
  ):
    if required and not exists:
      raise UserError(
        f'{folder} was prepared without {name}, which this config needs: prepare it again (python '
        '-m vpe_jax.prepare --help)'
      )
  prepared = {'language': manifest.language, 'least_text_height': manifest.least_text_height}
  required = {
    'language': record_filter.language,
    'least_text_height': record_filter.least_text_height,
  }
  if prepared['least_text_height'] or required['least_text_height']:
    prepared |= {'image_size': manifest.image_size, 'fit': manifest.fit}
    required |= {'image_size': record_filter.size, 'fit': record_filter.fit}
  if different := [name for name in prepared if prepared[name] != required[name]]:
    settings = ', '.join(
      f'{name}={prepared[name]!r} ({_section(name, record_filter)}{name} is {required[name]!r})'
      for name in different
    )
    raise UserError(
      f'{folder} was prepared with {settings}: prepare it again, or set the config to these values'
    )


def _section(name: str, record_filter: Filter) -> str:
  """Path of the config section of a field that a filter depends on."""
  return 'data.' if name in ('image_size', 'fit') else record_filter.section


class Writer(contextlib.AbstractContextManager):
  """Writes a shard record by record; a context manager, which completes the file on exit.

  Attributes:
    records: number of records written.
  """

  def __init__(self, path: Path):
    self.records = 0
    self._path = str(path)
    with self._as_os_errors():
      self._writer = ArrayRecordWriter(self._path, _WRITER_OPTIONS)

  def write(self, record: Content) -> None:
    """Adds a record.

    Raises:
      OSError: the file can't be written; exiting the block may raise it too.
    """
    with self._as_os_errors():
      self._writer.write(msgpack.packb(dataclasses.asdict(record)))
    self.records += 1

  def __exit__(self, *_: Any) -> None:
    with self._as_os_errors():
      self._writer.close()

  @contextlib.contextmanager
  def _as_os_errors(self) -> Iterator[None]:
    """Converts errors of array_record's C++ code to OSError."""
    try:
      yield
    except RuntimeError as error:
      is_full = os.strerror(errno.ENOSPC) in str(error)
      reason = os.strerror(errno.ENOSPC) if is_full else first_line(error)
      raise OSError(errno.ENOSPC if is_full else errno.EIO, reason, self._path) from error


def _read(folder: str, shard: Shard, index: int) -> Content:
  """Reads a record of a shard."""
  path = os.path.join(folder, shard.file)
  try:
    content = _readers(os.getpid())(path, shard.records)[index]
    return Content(**_checked(msgpack.unpackb(content)))
  except Exception as error:  # C++ errors, or a damaged map with any content.
    raise BadRecord(
      f'record {index} of {path} can not be read ({first_line(error)}): {_CURE}'
    ) from error


def _checked(values: Any) -> dict[str, Any]:
  """Returns the fields of a record if they have the right types."""
  captions = tuple(values.pop('captions', ()))  # Format 1 has none.
  fields = {field.name: field.type for field in dataclasses.fields(Content)}
  for name in fields.keys() - {'captions'}:
    kind = bytes if fields[name] == 'bytes' else str
    if not isinstance(values[name], kind):
      raise ValueError(f'{name} is no {kind.__name__}')
  if not all(isinstance(caption, str) for caption in captions):
    raise ValueError('captions are no str')
  return values | {'captions': captions}


@dataclasses.dataclass(frozen=True)
class _WholeFile:
  """Read instruction for a whole file; array_record need not open the file to count records."""

  filename: str
  take: int
  examples_in_shard: int
  skip: int = 0


@functools.cache
def _readers(process: int) -> Callable[[str, int], ArrayRecordDataSource]:
  """A function that opens a shard by path and number of records; an LRU cache of open shards.

  The cache key `process` gives each process its own readers: a forked child can't use the threads
  and files of its parent.
  """
  del process
  return functools.lru_cache(_max_open_shards())(
    lambda path, records: ArrayRecordDataSource([_WholeFile(path, records, records)])
  )


def _max_open_shards() -> int:
  """Number of shards that this process may keep open; raises the usual limit of 1,024 files."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  limit = _MAX_OPEN_SHARDS + _OTHER_FILES
  limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
  if soft != resource.RLIM_INFINITY and soft < limit:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
  return max(1, limit - _OTHER_FILES)
