"""Files and folders, local or on object stores: paths, atomic writes, names, checksums."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import re
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from vpe_jax.contracts import UserError

AnyPath = str | os.PathLike[str]

SHIPPED_ASSETS = Path(__file__).parent / 'assets'  # installed with the package

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
PATH_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP)  # a path that no file can have


@dataclasses.dataclass(frozen=True)
class HubName:
  """A model on the Hugging Face hub; `str` is `OWNER/NAME@REVISION:FOLDER`.

  Attributes:
    repo: `OWNER/NAME`.
    revision: a branch, tag or commit; empty for the newest.
    folder: a folder of the model; empty for all of it.
  """

  repo: str
  revision: str = ''
  folder: str = ''

  def __str__(self) -> str:
    revision = f'@{self.revision}' if self.revision else ''
    return f'{self.repo}{revision}{f":{self.folder}" if self.folder else ""}'


def hub_name(text: str) -> HubName | None:
  """Parses `OWNER/NAME`, with `@REVISION` and `:FOLDER` where there are any.

  Returns:
    The model; None if the text is a local path that exists, or has another form.
  """
  match = re.fullmatch(r'(\w[\w.-]*/[\w.-]+)(?:@([^@:]+))?(?::([^@:]+))?', text)
  if match is None or Path(text).exists():
    return None
  return HubName(match[1], match[2] or '', match[3] or '')


def cache_dir() -> Path:
  """`$VPE_JAX_CACHE`, or `vpe_jax` in the user's cache folder (XDG).

  Raises:
    UserError: the folder is on an object store, or the user has no home folder.
  """
  chosen = os.environ.get('VPE_JAX_CACHE')
  if chosen and is_remote(chosen):
    raise UserError(
      f'VPE_JAX_CACHE={chosen} is on an object store: name a local folder, or mount it (gcsfuse)'
    )
  folder = chosen or os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  try:
    path = Path(folder).expanduser()
  except RuntimeError as error:
    raise UserError(f'{folder} has no home folder: set VPE_JAX_CACHE to a folder') from error
  return path if chosen else path / 'vpe_jax'


def is_remote(path: AnyPath) -> bool:
  """Whether a path is on an object store such as gs://."""
  return '://' in str(path)


def resolve(path: AnyPath) -> epath.Path:
  """Resolves a user's path: local (`~` expands to the home folder) or on an object store.

  Raises:
    UserError: the path is empty, or its scheme is not supported.
  """
  if not str(path):
    raise UserError('the path of a file or folder is empty: name one')
  try:
    return epath.Path(path).expanduser()
  except KeyError as error:  # etils looks the scheme up in a table.
    raise UserError(f'{path} is out of reach: name a local path, or one on gs://') from error


def probe(path: epath.Path, predicate: Callable[[], bool]) -> bool:
  """Evaluates a predicate of a path that may be on an object store.

  Args:
    path: named in the error.
    predicate: such as `path.exists`.

  Raises:
    UserError: the client package of the object store is not installed.
  """
  try:
    return predicate()
  except ImportError as error:
    cure = "pip install -e '.[gcs]'" if str(path).startswith('gs://') else 'install that package'
    raise UserError(f'{path} is out of reach ({error}): {cure}, or name a local folder') from error


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[None]:
  """Context in which a failed write of a file or folder becomes a one-line error.

  Raises:
    UserError: the block raised an OSError.
  """
  try:
    yield
  except OSError as error:
    raise UserError(write_error(path, error)) from error


@contextlib.contextmanager
def removed_on_error(folder: AnyPath) -> Iterator[None]:
  """Context that writes a new folder, which is deleted if the block raises an exception."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(OSError):  # Something may still be writing; the first error counts.
      resolve(folder).rmtree()
    raise


def write_error(path: AnyPath | None, error: OSError) -> str:
  """Error message for a failed write to `path` (None: unknown), with the cure."""
  cure = 'free some space and run the same command again'
  cure = cure if is_disk_full(error) else 'name another path'
  return f'cannot write {path or "a file"}: {error.strerror or error}; {cure}'


def is_disk_full(error: OSError) -> bool:
  """Whether an error means that the disk or the user's quota is full."""
  return error.errno in FULL_ERRNOS


def read_text(path: AnyPath, name: str = '') -> str:
  r"""Reads a UTF-8 text file: line ends become `\n`, a byte order mark is dropped.

  Args:
    path: local (`~` expands to the home folder) or gs://.
    name: name of the file in the error; '' for its path.

  Raises:
    UserError: the file can't be read or is not UTF-8.
  """
  file = resolve(path)
  try:
    probe(file, file.exists)
    text = file.read_bytes().decode('utf-8-sig')
    return text.replace('\r\n', '\n').replace('\r', '\n')
  except OSError as error:
    reason = error.strerror or error
    raise UserError(
      f'cannot read {name or path} ({reason}): check the path and its permissions'
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(f'cannot read {name or path} ({error}): save it as text in UTF-8') from error


def files_below(folder: Path) -> Iterator[Path]:
  """Files of a local folder and its subfolders, also of linked ones, except hidden subfolders.

  Each folder is read once, and those behind links come last: a link to a folder that is also below
  `folder` has no effect.
  """
  pending, seen = [str(folder)], set()
  while pending:
    links: list[str] = []
    for parent, folders, files in os.walk(pending.pop(0)):
      stat = os.stat(parent)
      if (stat.st_dev, stat.st_ino) in seen:
        folders.clear()
        continue
      seen.add((stat.st_dev, stat.st_ino))
      folders[:] = sorted(name for name in folders if not name.startswith('.'))
      links += filter(os.path.islink, (os.path.join(parent, name) for name in folders))
      yield from (Path(parent, name) for name in files)
    pending += links


def local_path(path: AnyPath) -> Path:
  """Resolves a path that must be local; `~` expands to the home folder.

  Raises:
    UserError: the path is on an object store, or `~NAME` names no user.
  """
  if is_remote(path):
    raise UserError(
      f'{path} is on an object store, but data sets are read from and written to local folders: '
      'mount it (gcsfuse) or copy it, and name the local folder'
    )
  try:
    return Path(path).expanduser()
  except RuntimeError as error:
    raise UserError(f'{path} has no home folder: write the path without ~') from error


def checksum(path: AnyPath) -> int:
  """CRC-32 of a local file."""
  value = 0
  with open(path, 'rb') as file:
    while block := file.read(1 << 22):
      value = zlib.crc32(block, value)
  return value


def write_atomic(path: os.PathLike[str], content: bytes) -> None:
  """Writes a file atomically: readers, also in other processes, see all of it or none.

  The content goes to a temporary file with a unique name, which then replaces `path`.

  Raises:
    OSError: the write failed; an existing file is unchanged.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = _temporary_path(path)
  try:
    temporary.write_bytes(content)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """A temporary folder next to a local `folder`, renamed to it if the block succeeds."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix='.', suffix='.part'))
  try:
    yield unfinished
    unfinished.chmod(0o755)  # temporary folders are private
    unfinished.rename(folder)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def _temporary_path(path: epath.Path) -> epath.Path:
  """A path in the same folder that no other process, on any host, writes to."""
  if is_remote(path):
    return path.parent / f'.{path.name}.{uuid.uuid4().hex}.part'
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix='.', suffix='.part')
  os.fchmod(handle, 0o644)  # temporary files are private
  os.close(handle)
  return epath.Path(temporary)


def move_aside(path: epath.Path, name: str, joint: str = '') -> str:
  """Renames a file or folder to `name`, or to the next free `name{joint}{number}`, from 2 on.

  Returns:
    The new name.
  """
  target = first_free_path(path, name, joint)
  path.rename(target)
  return target.name


def first_free_path(path: epath.Path, name: str, joint: str = '') -> epath.Path:
  """The first unused path beside `path`: `name`, else `name{joint}2`, `name{joint}3`, ..."""
  numbered = (f'{name}{joint}{number}' for number in itertools.count(2))
  names = itertools.chain([name], numbered)
  return next(target for one in names if not (target := path.parent / one).exists())


def stable_hash(*parts: object) -> int:
  """A 63-bit hash of the parts; the same in all processes, platforms and Python versions."""
  text = '\x1f'.join(str(part) for part in parts)
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') >> 1
