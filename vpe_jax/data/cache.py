"""Cache on disk for `data.encode=cached`: encoded entries by source index.

Encoded entries are outputs of frozen encoders, such as visual prompt codes and latents.
A cache is a folder with array shards of each named entry and a manifest. The manifest holds the
fingerprint, name, dtype and shape of each entry, and a checksum of each shard. It is written last;
then the complete folder is renamed to its final name.
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
LAYOUT = 2  # version of the file layout; part of every fingerprint
_MANIFEST = 'manifest.json'
_FIELDS = {'fingerprint', 'count', 'shard', 'entries', 'checksums'}


class Encoded(Protocol):
  """Encoded entries by source index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """The entries of one record by name, int32 or float32, without a batch axis."""
    ...


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
  """The folder of the cache with this fingerprint; it need not exist."""
  name = hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
  return cache_dir() / 'encoded' / name


def open_cache(fingerprint: str) -> EncodedCache | None:
  """Opens and verifies the cache with this fingerprint.

  Args:
    fingerprint: everything that determines the content: source, resolution, encoder weights.

  Returns:
    The cache, or None if it does not exist.

  Raises:
    DamagedCacheError: the cache is truncated, altered, or has another fingerprint; the message
      names the file. `write_cache` with the same fingerprint replaces it.
  """
  folder = location(fingerprint)
  if not folder.exists():
    return None
  manifest = _manifest(folder)
  if manifest['fingerprint'] != fingerprint:
    raise DamagedCacheError(f'cache {folder} has another fingerprint; build it again')
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
  """Writes a cache atomically; replaces a damaged one.

  If another process completes the same cache first, that cache is returned and not replaced: a
  reader may have opened it.

  Args:
    fingerprint: everything that determines the content.
    batches: arrays [n, ...] by entry name, for n consecutive records; n may vary between batches,
      the names may not.
    shard: number of records in one file.

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
    return _publish(unfinished, fingerprint)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
    _mapped.cache_clear()


def _publish(unfinished: Path, fingerprint: str) -> EncodedCache:
  """Renames a complete cache to its final name, unless another process was first."""
  folder = location(fingerprint)
  try:
    existing = open_cache(fingerprint)
  except (DamagedCacheError, OSError):
    existing = None
    shutil.rmtree(folder, ignore_errors=True)
  if existing is not None:
    return existing
  try:
    unfinished.rename(folder)
  except OSError:  # Another process published its cache after the check above.
    existing = open_cache(fingerprint)
    if existing is None:
      raise
    return existing
  return _opened(folder, _manifest(folder))


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
  folder: Path, batches: Iterable[Mapping[str, np.ndarray]], shard: int
) -> dict[str, Any]:
  """Writes all shards; returns the fields of the manifest, without the fingerprint."""
  checksums: dict[str, int] = {}
  entries: list[tuple[str, str, tuple[int, ...]]] = []
  pending: list[dict[str, np.ndarray]] = []
  pending_count = count = 0

  def flush(size: int) -> None:
    nonlocal pending, pending_count, count
    joined = {name: np.concatenate([batch[name] for batch in pending]) for name in pending[0]}
    for name, array in joined.items():
      path = folder / _shard_name(name, count // shard)
      with _writing(folder.parent):
        np.save(path, array[:size])
      checksums[path.name] = checksum(path)
    pending = [{name: array[size:] for name, array in joined.items()}]
    pending_count, count = pending_count - size, count + size

  for batch in batches:
    pending.append({name: _standard(array) for name, array in batch.items()})
    entries = [(name, array.dtype.name, array.shape[1:]) for name, array in pending[-1].items()]
    pending_count += len(next(iter(batch.values())))
    while pending_count >= shard:
      flush(shard)
  if pending_count:
    flush(pending_count)
  return {'count': count, 'shard': shard, 'entries': entries, 'checksums': checksums}


def _standard(array: np.ndarray) -> np.ndarray:
  """Integers as int32, other numbers as float32."""
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
  """The memory-mapped array of a shard.

  The header is skipped by size: `np.load` parses it as Python, which occasionally fails in several
  threads at once (CPython 3.11 shares the parser's recursion depth among threads).
  """
  offset = path.stat().st_size - math.prod(shape) * np.dtype(dtype).itemsize
  return np.memmap(path, dtype, 'r', offset, shape)
