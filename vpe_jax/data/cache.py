"""Encoded entries on disk, by source index: the cache of `data.encode=cached`.

A cache is a folder of array shards, one set for each named entry, and a manifest with the
fingerprint, the entries and a checksum of each shard. The manifest is written last, and the folder
is renamed into place when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vpe_jax.contracts import UserError
from vpe_jax.storage import cache_dir, checksum

SHARD = 4096  # records in one shard
LAYOUT = 2  # of the files; part of every fingerprint
_MANIFEST = 'manifest.json'
_FIELDS = {'fingerprint', 'count', 'shard', 'entries', 'checksums'}


class Encoded(Protocol):
  """Encoded entries by source index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """The entries of one record by name, int32 or float32, without a batch axis."""
    ...


class DamagedCacheError(UserError):
  """A cache on disk that can't be trusted; building it again cures that."""


@dataclasses.dataclass(frozen=True)
class EncodedCache:
  """A verified cache. Reads are memory-mapped; reader processes open the files themselves.

  Attributes:
    folder: where the shards are.
    count: number of records.
    shard: records in every shard but the last.
    entries: (name, dtype, shape) of one record's arrays.
  """

  folder: Path
  count: int
  shard: int
  entries: tuple[tuple[str, str, tuple[int, ...]], ...]

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """The entries of one record; see Encoded."""
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count} in {self.folder}')
    number, offset = divmod(index, self.shard)
    size = min(self.shard, self.count - number * self.shard)
    shards = {
      name: _mapped(self.folder / _shard_name(name, number), dtype, (size, *shape))
      for name, dtype, shape in self.entries
    }
    return {name: np.array(shard[offset]) for name, shard in shards.items()}


def location(fingerprint: str) -> Path:
  """The folder of the cache with this fingerprint, whether it is there or not."""
  name = hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
  return cache_dir() / 'encoded' / name


def open_cache(fingerprint: str) -> EncodedCache | None:
  """Opens and verifies the cache with this fingerprint.

  Args:
    fingerprint: whatever decides the content: source, resolution, encoder weights.

  Returns:
    The cache, or None if there is none yet.

  Raises:
    DamagedCacheError: the cache is cut short, altered, or of another fingerprint; the message
      names the file. `write_cache` with the same fingerprint replaces it.
  """
  folder = location(fingerprint)
  if not folder.exists():
    return None
  manifest = _manifest(folder)
  if manifest['fingerprint'] != fingerprint:
    raise DamagedCacheError(f'cache {folder} was made for another fingerprint; build it again')
  for name, expected in manifest['checksums'].items():
    path = folder / name
    if not path.exists():
      raise DamagedCacheError(f'cache file {path} is missing; build the cache again')
    if checksum(path) != expected:
      raise DamagedCacheError(f'cache file {path} is damaged; build the cache again')
  return _opened(folder, manifest)


def _opened(folder: Path, manifest: dict[str, Any]) -> EncodedCache:
  entries = tuple((name, dtype, tuple(shape)) for name, dtype, shape in manifest['entries'])
  return EncodedCache(folder, manifest['count'], manifest['shard'], entries)


def write_cache(
  fingerprint: str, batches: Iterable[Mapping[str, np.ndarray]], shard: int = SHARD
) -> EncodedCache:
  """Writes a cache, replacing a damaged one; nothing is visible before it is whole.

  A good one that another process has put there in the meantime is kept: it may be reading it.

  Args:
    fingerprint: whatever decides the content.
    batches: the entries [n, ...] of consecutive records by name, any n, the same names each time.
    shard: records in one file.

  Raises:
    UserError: the cache folder can't be written.
  """
  folder = location(fingerprint)
  with _writing(folder.parent):
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'{folder.name}.part'))
  try:
    manifest = {'fingerprint': fingerprint, **_write_shards(unfinished, batches, shard)}
    with _writing(folder.parent):
      (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding='utf-8')
    return _put_in_place(unfinished, fingerprint)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
    _mapped.cache_clear()


def _put_in_place(unfinished: Path, fingerprint: str) -> EncodedCache:
  """Renames a whole cache into its place, unless another process was first."""
  folder = location(fingerprint)
  try:
    found = open_cache(fingerprint)
  except (DamagedCacheError, OSError):
    found = None
    shutil.rmtree(folder, ignore_errors=True)
  if found is not None:
    return found
  try:
    unfinished.rename(folder)
  except OSError:  # Another process put its own there after our look.
    found = open_cache(fingerprint)
    if found is None:
      raise
    return found
  return _opened(folder, _manifest(folder))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
  """Says what to do where the cache can't be written: no permission, no space."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write to the cache {folder} ({error.strerror or error}): set VPE_JAX_CACHE to '
      'another folder, or data.encode=online'
    ) from error


def _write_shards(
  folder: Path, batches: Iterable[Mapping[str, np.ndarray]], shard: int
) -> dict[str, Any]:
  """Writes all shards, and returns the manifest's fields but for the fingerprint."""
  checksums: dict[str, int] = {}
  entries: list[tuple[str, str, tuple[int, ...]]] = []
  pending: list[dict[str, np.ndarray]] = []
  waiting = count = 0

  def flush(size: int) -> None:
    nonlocal pending, waiting, count
    joined = {name: np.concatenate([batch[name] for batch in pending]) for name in pending[0]}
    for name, array in joined.items():
      path = folder / _shard_name(name, count // shard)
      with _writing(folder.parent):
        np.save(path, array[:size])
      checksums[path.name] = checksum(path)
    pending = [{name: array[size:] for name, array in joined.items()}]
    waiting, count = waiting - size, count + size

  for batch in batches:
    pending.append({name: _plain(array) for name, array in batch.items()})
    entries = [(name, array.dtype.name, array.shape[1:]) for name, array in pending[-1].items()]
    waiting += len(next(iter(batch.values())))
    while waiting >= shard:
      flush(shard)
  if waiting:
    flush(waiting)
  return {'count': count, 'shard': shard, 'entries': entries, 'checksums': checksums}


def _plain(array: np.ndarray) -> np.ndarray:
  """Whole numbers as int32, others as float32."""
  dtype = np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32
  return array.astype(dtype, copy=False)


def _manifest(folder: Path) -> dict[str, Any]:
  path = folder / _MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
    complete = _FIELDS <= manifest.keys()
  except (OSError, ValueError, AttributeError) as error:
    raise DamagedCacheError(f'cache file {path} is damaged ({error}); build it again') from error
  if not complete:
    raise DamagedCacheError(f'cache file {path} is incomplete; build the cache again')
  return manifest


def _shard_name(name: str, number: int) -> str:
  return f'{name}-{number:05d}.npy'


@functools.lru_cache(maxsize=1024)
def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
  """The array of a shard, without its header.

  `np.load` would parse the header as Python, which fails now and then where several reader
  threads do so at once (CPython 3.11: the parser's recursion depth is one for all threads).
  """
  offset = path.stat().st_size - math.prod(shape) * np.dtype(dtype).itemsize
  return np.memmap(path, dtype, 'r', offset, shape)
