"""Cache on disk for `data.encode=cached`: encoded entries by source index.

Encoded entries are outputs of frozen encoders, such as visual prompt codes and latents.
A cache is a folder with array shards of each named entry and a manifest, which has a line for each
event: the fingerprint, each complete shard with its checksums, and the end. Lines are only
appended, so an interrupted cache continues after its last complete shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import numpy as np

from vpe_jax.contracts import UserError
from vpe_jax.data.records import NotEncoded
from vpe_jax.storage import cache_dir, checksum

SHARD = 1024  # records in one shard; an interruption loses those of the incomplete shard
LAYOUT = 3  # version of the file layout; part of every fingerprint
_MANIFEST = 'manifest.jsonl'
_END = {'complete': True}  # last line of the manifest
FOLDER = 'encoded'  # subfolder of `cache_dir()` with all caches


class Encoded(Protocol):
  """Encoded entries by source index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """The entries of one record by name, int32 or float32, without a batch axis.

    Raises:
      NotEncoded: the record could not be read.
    """
    ...


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A line of the manifest: number of records, (name, dtype, shape) of entries, CRC-32 by file.

  `start` is the position of the line in the manifest, in bytes. `unreadable` has index and reason
  of the records that could not be read; the arrays have values of other records in their place.
  """

  count: int
  entries: list[tuple[str, str, tuple[int, ...]]]
  checksums: dict[str, int]
  start: int = 0
  unreadable: list[tuple[int, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Manifest:
  """The manifest of a cache; `end` is its length in bytes, without an incomplete last line."""

  fingerprint: str = ''
  shard: int = 0
  shards: tuple[_Shard, ...] = ()
  complete: bool = False
  end: int = 0

  @property
  def count(self) -> int:
    """Number of stored records."""
    return sum(shard.count for shard in self.shards)


class DamagedCacheError(UserError):
  """A cache on disk is damaged; building it again fixes that."""


@dataclasses.dataclass(frozen=True)
class EncodedCache:
  """A verified cache with memory-mapped reads; each reader process opens the files itself.

  Attributes:
    folder: folder of the shards.
    count: number of records.
    shard: number of records in each shard except the last.
    entries: (name, dtype, shape) of each array of one record.
    unreadable: index -> reason of records that could not be read, and have no entries.
  """

  folder: Path
  count: int
  shard: int
  entries: tuple[tuple[str, str, tuple[int, ...]], ...]
  unreadable: Mapping[int, str] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """The entries of one record; see Encoded."""
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count} in {self.folder}')
    if index in self.unreadable:
      raise NotEncoded(self.unreadable[index])
    number, offset = divmod(index, self.shard)
    size = min(self.shard, self.count - number * self.shard)
    shards = {
      name: _mapped(self.folder / _shard_name(name, number), dtype, (size, *shape))
      for name, dtype, shape in self.entries
    }
    return {name: np.array(shard[offset]) for name, shard in shards.items()}


def location(fingerprint: str) -> Path:
  """The folder of the cache with this fingerprint; it need not exist."""
  name = hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
  return cache_dir() / FOLDER / name


def open_cache(fingerprint: str) -> EncodedCache | None:
  """Opens and verifies the cache with this fingerprint.

  Args:
    fingerprint: everything that determines the content: source, resolution, encoder weights.

  Returns:
    The cache, or None if it does not exist or is not complete.

  Raises:
    DamagedCacheError: a file of a shard is missing or altered, or the fingerprint is another; the
      message names the file or folder.
      `write_cache` with the same fingerprint replaces what is damaged.
  """
  folder = location(fingerprint)
  manifest = _read_manifest(folder)
  if not manifest.complete:
    return None
  if manifest.fingerprint != fingerprint:
    raise DamagedCacheError(f'cache {folder} has another fingerprint; build it again')
  for shard in manifest.shards:
    _verify(folder, shard)
  return _opened(folder, manifest)


def _verify(folder: Path, shard: _Shard) -> None:
  """Verifies the checksums of a shard.

  Raises:
    DamagedCacheError: names the file that is missing or damaged.
  """
  for name, expected in shard.checksums.items():
    path = folder / name
    if not path.exists():
      raise DamagedCacheError(f'cache file {path} is missing; build the cache again')
    if checksum(path) != expected:
      raise DamagedCacheError(f'cache file {path} is damaged; build the cache again')


def _opened(folder: Path, manifest: _Manifest) -> EncodedCache:
  first = manifest.shards[0].entries if manifest.shards else []
  entries = tuple((name, dtype, tuple(shape)) for name, dtype, shape in first)
  unreadable = {index: reason for shard in manifest.shards for index, reason in shard.unreadable}
  return EncodedCache(folder, manifest.count, manifest.shard, entries, unreadable)


def write_cache(
  fingerprint: str,
  batches: Callable[[int], Iterable[Mapping[str, np.ndarray]]],
  shard: int = SHARD,
  unreadable: Mapping[int, str] = MappingProxyType({}),
) -> EncodedCache:
  """Writes a cache, or the missing shards of an interrupted or damaged one.

  If another process writes the same cache, this one waits, and uses what the other has written.

  Args:
    fingerprint: everything that determines the content.
    batches: called with the number of records that are stored already; yields the remaining ones in
      order, in batches: entry name -> array [n, ...]. n may vary between batches, the names may
      not.
    shard: number of records in one file.
    unreadable: index -> reason of records that have no entries; `batches` may add some meanwhile.

  Raises:
    UserError: the cache folder can't be written.
  """
  folder = location(fingerprint)
  with _writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  with _locked(folder):
    manifest = _intact(folder, fingerprint, shard)
    if not manifest.complete:
      with _writing(folder), (folder / _MANIFEST).open('ab') as file:
        file.truncate(manifest.end)
        if not manifest.end:
          _append(file, {'fingerprint': fingerprint, 'shard': shard})
        done = manifest.count
        for new in _write_shards(folder, batches(done), shard, len(manifest.shards)):
          records = range(done, done + new.count)
          own = [(index, unreadable[index]) for index in records if index in unreadable]
          _append(file, dataclasses.asdict(dataclasses.replace(new, unreadable=own)))
          done = records.stop
        _append(file, _END)
      _mapped.cache_clear()
      manifest = _read_manifest(folder)
  return _opened(folder, manifest)


def _append(file: BinaryIO, values: Mapping[str, Any]) -> None:
  file.write(json.dumps(values).encode() + b'\n')
  file.flush()


def _intact(folder: Path, fingerprint: str, shard: int) -> _Manifest:
  """The manifest of a cache up to its first damaged shard; an empty one if it is another cache."""
  manifest = _read_manifest(folder)
  if (manifest.fingerprint, manifest.shard) != (fingerprint, shard):
    return _Manifest()
  for number, one in enumerate(manifest.shards):
    try:
      _verify(folder, one)
    except DamagedCacheError:
      return dataclasses.replace(
        manifest, shards=manifest.shards[:number], complete=False, end=one.start
      )
  return manifest


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Holds the lock of a cache, which the system releases even if the process is killed."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    if not _try_lock(handle):
      print(f'waiting for another process that writes the cache {folder}', flush=True)
      while not _try_lock(handle):
        time.sleep(1.0)
    yield
  finally:
    os.close(handle)


def _try_lock(handle: int) -> bool:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
  """Converts OSError (no permission, no space) to a UserError that names the cure."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write to the cache {folder} ({error.strerror or error}): set VPE_JAX_CACHE to '
      'another folder, or data.encode=online'
    ) from error


def _write_shards(
  folder: Path, batches: Iterable[Mapping[str, np.ndarray]], shard: int, number: int
) -> Iterator[_Shard]:
  """Writes shards, of which the first has this number; yields each one once it is complete."""
  pending: list[dict[str, np.ndarray]] = []
  count = 0
  for batch in batches:
    pending.append({name: _standard(array) for name, array in batch.items()})
    count += len(next(iter(batch.values())))
    while count >= shard:
      joined = {name: np.concatenate([one[name] for one in pending]) for name in pending[0]}
      yield _write_shard(folder, {name: array[:shard] for name, array in joined.items()}, number)
      pending = [{name: array[shard:] for name, array in joined.items()}]
      number, count = number + 1, count - shard
  if count:
    joined = {name: np.concatenate([one[name] for one in pending]) for name in pending[0]}
    yield _write_shard(folder, joined, number)


def _write_shard(folder: Path, arrays: Mapping[str, np.ndarray], number: int) -> _Shard:
  checksums = {}
  for name, array in arrays.items():
    path = folder / _shard_name(name, number)
    try:
      np.save(path, array)
    except OSError:
      path.unlink(missing_ok=True)  # A full disk: nothing that is half written stays.
      raise
    checksums[path.name] = checksum(path)
  entries = [(name, array.dtype.name, array.shape[1:]) for name, array in arrays.items()]
  return _Shard(len(next(iter(arrays.values()))), entries, checksums)


def _standard(array: np.ndarray) -> np.ndarray:
  """Integers as int32, other numbers as float32."""
  dtype = np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32
  return array.astype(dtype, copy=False)


def _read_manifest(folder: Path) -> _Manifest:
  """The manifest of a cache, up to its last complete line; empty if there is none."""
  manifest, start = _Manifest(), 0
  path = folder / _MANIFEST
  for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
    if not line.endswith(b'\n'):
      break  # An interrupted write: the next line would be appended to this one.
    try:
      values = json.loads(line)
      if values == _END:
        manifest = dataclasses.replace(manifest, complete=True)
      elif not start:
        manifest = _Manifest(values['fingerprint'], values['shard'])
      else:
        shard = _Shard(**values | {'start': start})
        manifest = dataclasses.replace(manifest, shards=(*manifest.shards, shard))
    except (ValueError, KeyError, TypeError):
      break  # An interrupted write; the rest is written again.
    start += len(line)
  return dataclasses.replace(manifest, end=start)


def _shard_name(name: str, number: int) -> str:
  return f'{name}-{number:05d}.npy'


@functools.lru_cache(maxsize=1024)
def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
  """The memory-mapped array of a shard.

  The header is skipped by size: `np.load` parses it as Python, which occasionally fails in several
  threads at once (CPython 3.11 shares the parser's recursion depth among threads).
  """
  offset = path.stat().st_size - math.prod(shape) * np.dtype(dtype).itemsize
  return np.memmap(path, dtype, 'r', offset, shape)


@dataclasses.dataclass(frozen=True)
class Stored:
  """A cache on disk, as `vpe_jax.cache` lists it.

  Attributes:
    name: name of its folder.
    source: `data.source` of its images; empty if unknown.
    records: number of stored records.
    bytes: size of its files.
    complete: whether all records are stored.
    changed: time of the last write.
  """

  name: str
  source: str
  records: int
  bytes: int
  complete: bool
  changed: datetime.datetime


def list_caches() -> list[Stored]:
  """All caches on disk, including unfinished ones, sorted by the time of their last write."""
  parent = cache_dir() / FOLDER
  folders = [path for path in parent.iterdir() if path.is_dir()] if parent.exists() else []
  return sorted(map(_stored, folders), key=lambda stored: stored.changed)


def _stored(folder: Path) -> Stored:
  manifest = _read_manifest(folder)
  try:
    source = str(json.loads(manifest.fingerprint)['data']['source'])
  except (ValueError, KeyError, TypeError):
    source = ''
  stats = [path.stat() for path in folder.iterdir()]
  changed = datetime.datetime.fromtimestamp(max([s.st_mtime for s in [*stats, folder.stat()]]))
  size = sum(stat.st_size for stat in stats)
  return Stored(folder.name, source, manifest.count, size, manifest.complete, changed)


def delete_cache(name: str) -> bool:
  """Deletes a cache; returns False if a process is writing it."""
  folder = cache_dir() / FOLDER / name
  handle = os.open(folder, os.O_RDONLY)
  try:
    is_free = _try_lock(handle)
    if is_free:
      shutil.rmtree(folder)
  finally:
    os.close(handle)
  return is_free
