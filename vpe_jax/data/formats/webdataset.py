"""WebDataset tar files as an input of vpe_jax.prepare.

Consecutive members whose names are equal up to the first dot form one record: `fox.jpg` and
`fox.txt`, or `fox.json` with the caption in a field. Nothing is unpacked, and member names never
serve as paths.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from absl import logging

from vpe_jax.contracts import UserError
from vpe_jax.data.formats.array_record import Content
from vpe_jax.data.formats.entries import FieldSpec, captions_of
from vpe_jax.data.inputs import Location, RawRecord, UnusableRecord, matching_files
from vpe_jax.data.records import caption_fields
from vpe_jax.data.transforms import DECODING, Decoding
from vpe_jax.storage import files_below, local_path

_IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'avif', 'bmp', 'gif', 'tif', 'tiff')
_CAPTIONS = ('caption', 'text', 'prompt')
_TEXT, _JSON = 'txt', 'json'
_GROUP = 'webdataset'  # class of members outside any folder
_MAX_TEXT = 2**24  # bytes of a text or JSON member

# First bytes of gzip, bzip2, xz and Zstandard files.
_COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')
_COMPRESSED_ENDINGS = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')

_Parts = dict[str, tuple[int, int]]  # ending -> offset and length of the member, in bytes


class _RecordError(ValueError):
  """A member of a record is missing or malformed."""


@dataclasses.dataclass(frozen=True)
class Tars:
  """Tar files in the order of their names.

  Attributes:
    names: path -> name of the tar file in record ids.
    fields: fields that each record must have. `image` and `reference` are endings such as `jpg` or
      `before.png`; `caption` is an ending, or a field of the JSON member.
    decoding: limits of the images; a damaged header may claim any size.
  """

  names: Mapping[str, str]
  fields: FieldSpec
  decoding: Decoding = Decoding()

  def count(self) -> None:
    """None: counting requires reading the files."""

  def locations(self, scratch: Path) -> Iterator[Location]:
    """(tar file, key, parts, reason why the record is unusable or ''); see _records."""
    del scratch
    for path in self.names:
      for key, parts, reason in _records(path):
        yield path, key, parts, reason

  def read(self, locations: Sequence[Location]) -> Iterator[RawRecord | UnusableRecord]:
    """See Input."""
    for path, group in itertools.groupby(locations, key=lambda place: place[0]):
      try:
        file = open(path, 'rb')
      except OSError as error:
        yield from (UnusableRecord(self._id(path, key), str(error)) for _, key, _, _ in group)
        continue
      with file:
        for _, key, parts, reason in group:
          if reason:
            yield UnusableRecord(self._id(path, key), reason)
          else:
            yield self._read_record(file, path, key, parts)

  def _id(self, path: str, key: str) -> str:
    return f'{self.names[path]}/{key}'

  def _read_record(
    self, file: BinaryIO, path: str, key: str, parts: _Parts
  ) -> RawRecord | UnusableRecord:
    """Reads the members of one record."""
    where = f'{key} in {path}'
    try:
      image = self._image(file, parts, [self.fields.image] if self.fields.image else _IMAGES)
      values = _json(file, parts)
      captions = caption_fields(self._captions(file, parts, values))
      reference = b''
      if self.fields.references:
        reference = self._image(file, parts, [self.fields.reference])
    except (OSError, ValueError, RecursionError) as error:
      return UnusableRecord(self._id(path, key), f'{where}: {error}')
    group = posixpath.basename(posixpath.dirname(key)) or _GROUP
    content = Content(
      id=self._id(path, key), group=group, image=image, reference=reference, **captions
    )
    return RawRecord(content, (values,), where)

  def _image(self, file: BinaryIO, parts: _Parts, endings: Sequence[str]) -> bytes:
    return _part(file, parts, endings, self.decoding.most_bytes)

  def _captions(self, file: BinaryIO, parts: _Parts, values: Mapping[str, Any]) -> tuple[str, ...]:
    name = self.fields.caption
    if (ending := name or _TEXT) in parts:
      text = ' '.join(_part(file, parts, [ending], _MAX_TEXT).decode('utf-8-sig').split())
      if text:
        return (text,)
    return captions_of(values, f'its .{_JSON}', *([name] if name else _CAPTIONS))


def open_tars(pattern: str, fields: FieldSpec, decoding: Decoding = DECODING) -> Tars:
  """Opens the tar files that match a pattern, or those of a folder.

  Raises:
    UserError: there are none, or some are compressed.
  """
  folder = local_path(pattern)
  below = files_below(folder) if folder.is_dir() else ()
  compressed = [str(path) for path in below if path.name.endswith(_COMPRESSED_ENDINGS)]
  names = {} if compressed else matching_files(pattern, '.tar')
  compressed += filter(_is_compressed, names)
  if compressed:
    raise UserError(
      f'{compressed[0]} is compressed, which excludes random access: decompress it first (gunzip, '
      'bunzip2, unxz or unzstd)'
    )
  return Tars(names, fields, decoding)


def _is_compressed(path: str) -> bool:
  with open(path, 'rb') as file:
    return file.read(8).startswith(_COMPRESSED)


def _records(path: str) -> Iterator[tuple[str, _Parts, str]]:
  """(key, parts, reason why the record is unusable or '') of each record of a tar file.

  The key is the common name of the members, up to the first dot.
  """
  earlier: set[int] = set()
  for key, members in itertools.groupby(_members(path), key=lambda member: member[0]):
    parts: _Parts = {}
    reason = ''
    for _, ending, offset, size in members:
      if size < 0:  # The marker of a damaged part, see _members.
        reason = ending
      elif ending in parts:
        reason = f'two members of {path} are {key}.{ending}'
      parts[ending] = offset, size
    if (number := hash(key)) in earlier:
      reason = f'members of {path} named {key} are not consecutive'
    earlier.add(number)
    yield key, parts, reason


def _members(path: str) -> Iterator[tuple[str, str, int, int]]:
  """(key, ending, offset, length) of each file in a tar file.

  After damage, reading continues at the next valid header. For each damaged part, and for an end
  that can't be read, there is an item (name of the part, reason, 0, -1).
  """
  end = 0  # of the last member
  try:
    # With `ignore_zeros`, tarfile looks for the next valid header.
    options = {'encoding': 'utf-8', 'errors': 'surrogateescape', 'ignore_zeros': True}
    with tarfile.open(path, 'r:', **options) as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # Otherwise tarfile keeps all members in memory.
        if _is_damaged(tar.fileobj, end, member.offset):
          yield _damage(path, end, member.offset)
        end = tar.offset
        folder, base = posixpath.split(_text(member.name).removeprefix('./'))
        stem, _, ending = base.partition('.')
        if member.isreg() and not member.issparse() and stem and ending:
          yield posixpath.join(folder, stem), ending.lower(), member.offset_data, member.size
      size = tar.fileobj.seek(0, os.SEEK_END)
      is_damaged = _is_damaged(tar.fileobj, end, size)
      # A tar file without members is one block of zeros; a longer one is an unfinished download.
      if not end and (is_damaged or size > tarfile.RECORDSIZE):
        raise tarfile.ReadError('it is not an uncompressed tar file')
      if is_damaged:
        yield _damage(path, end, size)
      elif end >= size:
        raise tarfile.ReadError('it is truncated')
  except (tarfile.TarError, OSError, EOFError, ValueError) as error:
    logging.warning('%s can not be read to its end (%s): download it again', path, error)
    yield '', f'{path} can not be read to its end ({error}): download it again', 0, -1


def _is_damaged(file: BinaryIO, start: int, end: int) -> bool:
  """Whether there is damage between two members; keeps the position in the file.

  Intact are zeros and PAX global headers, as `git archive` writes.
  """
  position = file.tell()
  file.seek(start)
  damaged = False
  while not damaged and (block := file.read(max(0, min(tarfile.BLOCKSIZE, end - file.tell())))):
    if block.strip(b'\0'):
      size = _global_header_size(block)
      damaged = size is None
      file.seek(size or 0, os.SEEK_CUR)
  file.seek(position)
  return damaged


def _global_header_size(block: bytes) -> int | None:
  """Size of the content that follows a PAX global header; None for any other block."""
  try:
    header = tarfile.TarInfo.frombuf(block, 'utf-8', 'surrogateescape')
  except tarfile.HeaderError:
    return None
  blocks = -(-header.size // tarfile.BLOCKSIZE)
  return blocks * tarfile.BLOCKSIZE if header.type == tarfile.XGLTYPE else None


def _damage(path: str, start: int, end: int) -> tuple[str, str, int, int]:
  reason = f'bytes {start:,} to {end:,} of {path} are damaged: download it again'
  logging.warning('%s', reason)
  return f'bytes {start}', reason, 0, -1


def _text(name: str) -> str:
  """A member name with invalid UTF-8 replaced."""
  return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def _part(file: BinaryIO, parts: _Parts, endings: Sequence[str], most_bytes: int) -> bytes:
  """The bytes of the first member that has one of the endings, if it is not too large."""
  for ending in endings:
    if ending in parts:
      offset, size = parts[ending]
      if size > most_bytes:
        raise _RecordError(f'its .{ending} has {size:,} bytes, more than {most_bytes:,}')
      file.seek(offset)
      content = file.read(size)
      if len(content) < size:
        raise _RecordError('the tar file ends within this record')
      return content
  raise _RecordError(f'has no .{" or .".join(endings)}, but .{", .".join(parts)}')


def _json(file: BinaryIO, parts: _Parts) -> Mapping[str, Any]:
  """The fields of the JSON member; none if there is no such member."""
  if _JSON not in parts:
    return {}
  values = json.loads(_part(file, parts, [_JSON], _MAX_TEXT))
  if not isinstance(values, dict):
    raise _RecordError('its .json is not an object')
  return values
