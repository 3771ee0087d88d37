"""Codes and latents on disk, by source index: what `data.encode=cached` reads.

A cache is a folder of array shards and a manifest with its fingerprint and a checksum of each
shard. The manifest is written last, and the folder is renamed into place when it is whole.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vpe_jax.contracts import UserError
from vpe_jax.storage import cache_dir, checksum

SHARD = 4096  # records in one shard
_MANIFEST = 'manifest.json'
KINDS = ('codes', 'latents', 'reference_latents')  # fields of Examples; a cache may lack the last


class Encoded(Protocol):
  """Codes and latents by source index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
    """Codes [P] int32 and latents of one record: [h, w, C] float32, or [h, w] int32 codes.

    Latents of the picture before an edit come third, where there is one.
    """
    ...


class DamagedCacheError(UserError):
  """A cache on disk that can't be trusted; building it again cures that."""


@dataclasses.dataclass(frozen=True)
class EncodedCache:
  """A verified cache. Reads are memory-mapped; reader processes open the files themselves.

  Attributes:
    folder: where the shards are.
    count: records in all.
    shard: records in every shard but the last.
    kinds: dtype and shape of one record's arrays, in the order of KINDS; none in an empty cache.
  """

  folder: Path
  count: int
  shard: int
  kinds: tuple[tuple[str, tuple[int, ...]], ...]

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
    """Codes and latents of one record; see Encoded."""
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count} in {self.folder}')
    number, row = divmod(index, self.shard)
    rows = min(self.shard, self.count - number * self.shard)
    shards = (
      _mapped(self.folder / _shard_name(kind, number), dtype, (rows, *shape))
      for kind, (dtype, shape) in zip(KINDS, self.kinds)
    )
    return tuple(np.array(shard[row]) for shard in shards)


def location(fingerprint: str) -> Path:
  """The folder of the cache with this fingerprint, whether it is there or not."""
  name = hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
  return cache_dir() / 'encoded' / name


def open_cache(fingerprint: str) -> EncodedCache | None:
  """Opens and verifies the cache of codes and latents with this fingerprint.

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
  """The cache in `folder`; every shard holds records like those of the first one."""
  count = manifest['count']
  names = [_shard_name(kind, 0) for kind in KINDS]
  first = [np.load(folder / name, mmap_mode='r') for name in names if name in manifest['checksums']]
  kinds = tuple((array.dtype.name, array.shape[1:]) for array in first)
  return EncodedCache(folder, count, manifest['shard'], kinds)


def write_cache(
  fingerprint: str, batches: Iterable[tuple[np.ndarray, ...]], shard: int = SHARD
) -> EncodedCache:
  """Writes a cache, replacing a damaged one; nothing is visible before it is whole.

  A good one that another process has put there in the meantime is kept: it may be reading it.

  Args:
    fingerprint: whatever decides the content.
    batches: codes [n, P] and latents [n, h, w, C] (or codes [n, h, w]) of consecutive records,
      any n; and latents of the pictures before, where they are edits.
    shard: records in one file.

  Raises:
    UserError: the cache folder can't be written.
  """
  folder = location(fingerprint)
  with _writing(folder.parent):
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'{folder.name}.part'))
  try:
    count, checksums = _write_shards(unfinished, batches, shard)
    manifest = {
      'fingerprint': fingerprint,
      'count': count,
      'shard': shard,
      'checksums': checksums,
    }
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
  folder: Path, batches: Iterable[tuple[np.ndarray, ...]], shard: int
) -> tuple[int, dict[str, int]]:
  """Returns the number of records and the checksum of each file."""
  checksums: dict[str, int] = {}
  waiting: list[tuple[np.ndarray, ...]] = []
  held = count = 0

  def flush(rows: int) -> None:
    nonlocal waiting, held, count
    joined = [np.concatenate(arrays) for arrays in zip(*waiting, strict=True)]
    for kind, array in zip(KINDS, joined):
      path = folder / _shard_name(kind, count // shard)
      with _writing(folder.parent):
        np.save(path, array[:rows])
      checksums[path.name] = checksum(path)
    waiting = [tuple(array[rows:] for array in joined)]
    held, count = held - rows, count + rows

  for arrays in batches:
    waiting.append(tuple(_plain(array) for array in arrays))
    held += len(arrays[0])
    while held >= shard:
      flush(shard)
  if held:
    flush(held)
  return count, checksums


def _plain(array: np.ndarray) -> np.ndarray:
  """Whole numbers as int32, others as float32."""
  dtype = np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32
  return array.astype(dtype, copy=False)


def _manifest(folder: Path) -> dict[str, Any]:
  path = folder / _MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
    complete = {'fingerprint', 'count', 'shard', 'checksums'} <= manifest.keys()
  except (OSError, ValueError, AttributeError) as error:
    raise DamagedCacheError(f'cache file {path} is damaged ({error}); build it again') from error
  if not complete:
    raise DamagedCacheError(f'cache file {path} is incomplete; build the cache again')
  return manifest


def _shard_name(kind: str, number: int) -> str:
  return f'{kind}-{number:05d}.npy'


@functools.lru_cache(maxsize=1024)
def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
  """The array of a shard, without its header.

  `np.load` would parse the header as Python, which fails now and then where several reader
  threads do so at once (CPython 3.11: the parser's recursion depth is one for all threads).
  """
  offset = path.stat().st_size - math.prod(shape) * np.dtype(dtype).itemsize
  return np.memmap(path, dtype, 'r', offset, shape)
