"""WebDataset's tars as an input of vpe_jax.prepare: pictures and their captions, side by side.

Members that follow one another and whose names are equal up to the first dot are one record:
`fox.jpg` and `fox.txt`, or `fox.json` with the caption in a field. Nothing is unpacked, and no
member's name is used as a path.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from absl import logging

from vpe_jax.data.formats.array_record import Content
from vpe_jax.data.formats.folder import FieldSpec, first_text
from vpe_jax.data.inputs import RawRecord, Location, UnusableRecord, matching_files

_IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'bmp', 'gif', 'tif', 'tiff')
_CAPTIONS = ('caption', 'text', 'prompt')
_TEXT, _JSON = 'txt', 'json'
_GROUP = 'webdataset'  # of members that lie in no folder
_LONGEST = 1 << 24  # bytes of a text or JSON: one that is longer is no caption

_Parts = dict[str, tuple[int, int]]  # ending -> offset and length of the member


class _Lacking(ValueError):
  """A record lacks what is fields for."""


@dataclasses.dataclass(frozen=True)
class Tars:
  """Tars in the order of their names, members in the order of the tar.

  Attributes:
    names: path -> name of the tar in ids.
    fields: what pictures need, `image` and `reference` as endings such as `jpg` or `before.png`,
      `caption` as an ending, or as a field of the JSON.
  """

  names: Mapping[str, str]
  fields: FieldSpec

  def count(self) -> None:
    """Only reading all of it tells."""

  def places(self, scratch: Path) -> Iterator[Location]:
    """(tar, key, parts, why it can't be used or '')."""
    del scratch
    for path in self.names:
      for key, parts, reason in _records(path):
        yield path, key, parts, reason

  def read(self, places: Sequence[Location]) -> Iterator[RawRecord | UnusableRecord]:
    """See Input."""
    for path, same in itertools.groupby(places, key=lambda place: place[0]):
      try:
        file = open(path, 'rb')
      except OSError as error:
        yield from (UnusableRecord(self._id(path, key), str(error)) for _, key, _, _ in same)
        continue
      with file:
        for _, key, parts, reason in same:
          yield (
            self._found(file, path, key, parts)
            if not reason
            else UnusableRecord(self._id(path, key), reason)
          )

  def _id(self, path: str, key: str) -> str:
    return f'{self.names[path]}/{key}'

  def _found(self, file: BinaryIO, path: str, key: str, parts: _Parts) -> RawRecord | UnusableRecord:
    """One record, from the bytes of its members."""
    where = f'{key} in {path}'
    try:
      image = _part(file, parts, [self.fields.image] if self.fields.image else _IMAGES)
      values = _json(file, parts)
      caption = self._caption(file, parts, values)
      reference = _part(file, parts, [self.fields.reference]) if self.fields.references else b''
    except (OSError, ValueError, RecursionError) as error:
      return UnusableRecord(self._id(path, key), f'{where}: {error}')
    group = posixpath.basename(posixpath.dirname(key)) or _GROUP
    content = Content(self._id(path, key), caption, group, image, reference)
    return RawRecord(content, (values,), where)

  def _caption(self, file: BinaryIO, parts: _Parts, values: Mapping[str, Any]) -> str:
    name = self.fields.caption
    if (ending := name or _TEXT) in parts:
      caption = ' '.join(_short(file, parts, ending).decode('utf-8-sig').split())
    else:
      caption = first_text(values, *([name] if name else _CAPTIONS)) or ''
    return caption


def open_tars(pattern: str, fields: FieldSpec) -> Tars:
  """The tars that a pattern names, or that lie in a folder.

  Raises:
    UserError: there are none.
  """
  return Tars(matching_files(pattern, '.tar'), fields)


def _records(path: str) -> Iterator[tuple[str, _Parts, str]]:
  """(key, members, why it can't be used or '') of each record of a tar."""
  earlier: set[int] = set()
  for key, members in itertools.groupby(_members(path), key=lambda member: member[0]):
    parts: _Parts = {}
    reason = ''
    for _, ending, offset, size in members:
      if size < 0:  # The end of a tar that was cut short.
        reason = ending
      elif ending in parts:
        reason = f'two members of {path} are {key}.{ending}'
      parts[ending] = offset, size
    if (number := hash(key)) in earlier:
      reason = f'members of {path} that are named {key} do not follow one another'
    earlier.add(number)
    yield key, parts, reason


def _members(path: str) -> Iterator[tuple[str, str, int, int]]:
  """(key, ending, offset, length) of each file in a tar.

  One that can't be read to its end is followed by ('', why, 0, -1).
  """
  try:
    with tarfile.open(path, 'r:', encoding='utf-8', errors='surrogateescape') as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # It would hold all of them.
        folder, base = posixpath.split(_text(member.name).removeprefix('./'))
        stem, _, ending = base.partition('.')
        if member.isreg() and not member.issparse() and stem and ending:
          yield posixpath.join(folder, stem), ending.lower(), member.offset_data, member.size
      tar.fileobj.seek(tar.offset)
      # tarfile takes a header that it doesn't understand for the end, which is a block of zeros.
      if (end := tar.fileobj.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError('it has no end' if not end else 'a bad header')
  except (tarfile.TarError, OSError, EOFError, ValueError) as error:
    logging.warning('%s can not be read to its end (%s): get it again', path, error)
    yield '', f'{path} can not be read to its end ({error}): get it again', 0, -1


def _text(name: str) -> str:
  """A member's name without what is no UTF-8."""
  return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def _part(file: BinaryIO, parts: _Parts, endings: Sequence[str]) -> bytes:
  """The bytes of the first of the members."""
  for ending in endings:
    if ending in parts:
      offset, size = parts[ending]
      file.seek(offset)
      content = file.read(size)
      if len(content) < size:
        raise _Lacking('the tar ends within it')
      return content
  raise _Lacking(f'has no .{" or .".join(endings)}, but .{", .".join(parts)}')


def _short(file: BinaryIO, parts: _Parts, ending: str) -> bytes:
  if parts[ending][1] > _LONGEST:
    raise _Lacking(f'its .{ending} has {parts[ending][1]:,} bytes')
  return _part(file, parts, [ending])


def _json(file: BinaryIO, parts: _Parts) -> Mapping[str, Any]:
  """The fields of the record's JSON, where it has one."""
  if _JSON not in parts:
    return {}
  values = json.loads(_short(file, parts, _JSON))
  if not isinstance(values, dict):
    raise _Lacking('its .json has no fields')
  return values
