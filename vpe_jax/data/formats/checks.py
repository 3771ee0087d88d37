"""The check of image files before training: each file is read and decoded once.

The cache folder stores, for each intact file, a hash of its stamp (name, size, modification time,
limits) and a hash of its content. Files whose stamp is stored are not read again.

Several processes share a check: each reads its part of the files, and all get the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG

import numpy as np
from absl import logging
from tqdm import tqdm

from vpe_jax import sharding
from vpe_jax.contracts import UserError
from vpe_jax.data.formats.entries import abbreviated, check_text, printable
from vpe_jax.data.records import BadRecord
from vpe_jax.data.transforms import Decoding
from vpe_jax.storage import cache_dir, stable_hash, write_atomic

FOLDER = 'checked'  # of the cache folder
_CHUNK = 256  # files checked between two writes of results
_SILENT_SECONDS = 2.0  # shorter checks show no progress
_MAX_OUTDATED = 4096  # outdated results that a file of results may hold


@dataclasses.dataclass(frozen=True)
class Checked:
  """Result of a check.

  Attributes:
    contents: file name -> hash of the content of each intact file.
    reasons: file name -> why the file can't be used.
  """

  contents: dict[str, int]
  reasons: dict[str, str]


def check_images(
  folder: Path, names: Sequence[str], decoding: Decoding, is_whole: bool = False
) -> Checked:
  """Reads and decodes image files that were not checked before, in one thread per core.

  With n processes, each checks every n-th file; all must call this, and all return the same.

  Args:
    folder: parent folder.
    names: different names of files in the folder.
    decoding: limits that the files must respect.
    is_whole: whether these are all images of the folder; results of other files may be deleted.

  Raises:
    UserError: the processes have different names.
  """
  index, count = sharding.process_position()
  checked = _check_own(folder, names[index::count], decoding, is_whole)
  if count == 1:
    return checked
  part = [stable_hash(*names), checked.contents, checked.reasons]
  listings, contents, reasons = zip(*map(json.loads, sharding.gather_texts(json.dumps(part))))
  if len(set(listings)) > 1:
    raise UserError(
      f'the hosts list different images in data folder {folder}: give all of them the same files'
    )
  merge = lambda parts: {name: value for part in parts for name, value in part.items()}
  return Checked(merge(contents), merge(reasons))


def _check_own(folder: Path, names: Sequence[str], decoding: Decoding, is_whole: bool) -> Checked:
  """Checks the files of this process; see check_images."""
  results = _Results(folder)
  reasons: dict[str, str] = {}
  stamps: dict[str, int] = {}
  for name in names:
    try:
      stamps[name] = _stamp(folder, name, decoding)
    except BadRecord as error:
      reasons[name] = str(error)
  unchecked = [name for name, stamp in stamps.items() if stamp not in results.contents]

  def check(name: str) -> int | BadRecord:
    try:
      return _check(folder / name, _shown(folder, name), decoding)
    except BadRecord as error:
      return error

  bar = tqdm(total=len(unchecked), desc='checking images', unit='image', delay=_SILENT_SECONDS)
  with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(unchecked), _CHUNK):
      chunk, new = unchecked[start : start + _CHUNK], {}
      for name, result in zip(chunk, pool.map(check, chunk), strict=True):
        if isinstance(result, BadRecord):
          reasons[name] = str(result)
        else:
          new[stamps[name]] = result
        bar.update()
      results.add(new)
  contents = {
    n: results.contents[stamp] for n, stamp in stamps.items() if stamp in results.contents
  }
  if is_whole:
    results.compact(set(stamps.values()))
  return Checked(contents, reasons)


def _stamp(folder: Path, name: str, decoding: Decoding) -> int:
  """A hash that changes whenever the file or a limit changes.

  Raises:
    BadRecord: there is no such file, it is a folder, a pipe or a device, or its name is not valid
      text.
  """
  try:
    stat = os.stat(folder / name)
  except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: no valid name.
    raise BadRecord(f'image {_shown(folder, name)} does not exist') from error
  except OSError as error:
    raise BadRecord(f'image {_shown(folder, name)} can not be read ({error.strerror})') from error
  if not S_ISREG(stat.st_mode):  # Reading a pipe or a device may never end.
    raise BadRecord(f'image {_shown(folder, name)} is no regular file')
  check_text(name, f'image {_shown(folder, name)}', 'name')
  limits = (decoding.most_pixels, decoding.most_bytes)
  return stable_hash(name, stat.st_size, stat.st_mtime_ns, *limits)


def _check(path: Path, shown: str, decoding: Decoding) -> int:
  """The hash of the content of an intact file.

  Raises:
    BadRecord: the file can't be read or decoded, or exceeds a limit.
  """
  try:
    decoding.check_bytes(path.stat().st_size, shown)
    content = path.read_bytes()
  except OSError as error:
    raise BadRecord(f'image {shown} can not be read ({error.strerror})') from error
  decoding.check(content, shown)
  return content_hash(content)


def content_hash(content: bytes) -> int:
  """A 63-bit hash of the bytes of an image file."""
  return stable_hash(hashlib.blake2b(content).hexdigest())


def record_hash(image: int, reference: int | None = None) -> int:
  """A hash of a record, from the hashes of its image files."""
  return image if reference is None else stable_hash(image, reference)


class _Results:
  """Results of earlier checks of a folder: files of pairs of 64-bit hashes (stamp, content).

  Each of several processes writes its own file, as they may share the cache folder, and reads all.

  Attributes:
    contents: hash of a file's stamp -> hash of its content.
  """

  def __init__(self, folder: Path):
    name = f'{stable_hash(folder.resolve()):016x}'
    index, count = sharding.process_position()
    part = f'-{index}' if count > 1 else ''
    self._path = cache_dir() / FOLDER / f'{name}{part}.u64'
    self.contents: dict[int, int] = {}
    with _warned(), contextlib.suppress(NotADirectoryError):
      for path in self._path.parent.glob(f'{name}*.u64'):
        values = np.fromfile(path, '<u8')
        self.contents |= values[: len(values) // 2 * 2].reshape(-1, 2).tolist()

  def add(self, contents: dict[int, int]) -> None:
    """Stores results at once, so that an interrupted check continues."""
    self.contents |= contents
    with _warned():
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with self._path.open('ab') as file:
        file.truncate(file.tell() // 16 * 16)  # An interrupted write leaves part of a pair.
        file.write(_pairs(contents))

  def compact(self, stamps: set[int]) -> None:
    """Removes results of other stamps, if there are many."""
    if len(self.contents) > 2 * len(stamps) + _MAX_OUTDATED:
      self.contents = {stamp: self.contents[stamp] for stamp in stamps & self.contents.keys()}
      with _warned():
        write_atomic(self._path, _pairs(self.contents))


@contextlib.contextmanager
def _warned() -> Iterator[None]:
  """Context in which results that can't be read or written are only a warning."""
  try:
    yield
  except OSError as error:
    logging.warning('%s; images may be checked again at the next start', error)


def _pairs(contents: dict[int, int]) -> bytes:
  return np.asarray(list(contents.items()), '<u8').tobytes()


def _shown(folder: Path, name: str) -> str:
  return printable(folder / abbreviated(name))
