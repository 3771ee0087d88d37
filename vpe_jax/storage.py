"""Files and folders, here and on object stores: where they are, and how they get there whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from vpe_jax.contracts import UserError

AnyPath = str | os.PathLike[str]

SHIPPED_ASSETS = Path(__file__).parent / 'assets'  # installed with the package

_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_dir() -> Path:
  """`$VPE_JAX_CACHE`, or `vpe_jax` in the user's cache folder (XDG)."""
  chosen = os.environ.get('VPE_JAX_CACHE')
  if chosen:
    return Path(chosen).expanduser()
  return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'vpe_jax'


def is_remote(path: AnyPath) -> bool:
  """Whether a path is on an object store such as gs://."""
  return '://' in str(path)


def place(path: AnyPath) -> epath.Path:
  """A path that a user named: local (`~` is the home folder), or on an object store.

  Raises:
    UserError: it is empty, or of a kind that nothing here reads or writes.
  """
  if not str(path):
    raise UserError('a file or folder is named by an empty text: give it a name')
  try:
    return epath.Path(path).expanduser()
  except KeyError as error:  # etils knows schemes by a table.
    raise UserError(f'{path} is out of reach: name a local place, or one on gs://') from error


def reached(path: epath.Path, look: Callable[[], bool]) -> bool:
  """The answer of a first look at a path, which may be on an object store.

  Args:
    path: to be named in the error.
    look: `path.exists` or the like.

  Raises:
    UserError: the package that speaks to such an object store is not installed.
  """
  try:
    return look()
  except ImportError as error:
    cure = "pip install -e '.[gcs]'" if str(path).startswith('gs://') else 'install that package'
    raise UserError(f'{path} is out of reach ({error}): {cure}, or name a local folder') from error


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[None]:
  """Says in one line what the system says when a file or folder can't be written.

  Raises:
    UserError: the block raised an OSError.
  """
  try:
    yield
  except OSError as error:
    raise UserError(unwritable(path, error)) from error


def unwritable(path: AnyPath | None, error: OSError) -> str:
  """Why a place (None: it isn't known) can't be written, and the cure."""
  cure = 'free some space and run the same command again'
  cure = cure if is_full(error) else 'name another place'
  return f'cannot write {path or "a file"}: {error.strerror or error}; {cure}'


def is_full(error: OSError) -> bool:
  """Whether a disk, or somebody's share of it, is full."""
  return error.errno in _FULL


def read_text(path: AnyPath, name: str = '') -> str:
  """A text in UTF-8, its lines ended by a newline alone; a byte order mark is left out.

  Args:
    path: local.
    name: what an error calls it, if not by its path.

  Raises:
    UserError: it can't be read.
  """
  try:
    return Path(path).read_text(encoding='utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'cannot read {name or path} ({error}): save it as text in UTF-8') from error


def read_lines(path: AnyPath) -> Iterator[str]:
  """The lines of a text in UTF-8 one by one, as `read_text` reads it, without their newlines.

  Raises:
    UserError: it can't be read.
  """
  try:
    with open(path, encoding='utf-8-sig') as file:
      for line in file:
        yield line.removesuffix('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'cannot read {path} ({error}): save it as text in UTF-8') from error


def local(path: AnyPath) -> Path:
  """A path whose files are opened in place, with `~` for the home folder.

  Raises:
    UserError: it is on an object store.
  """
  if is_remote(path):
    raise UserError(
      f'{path} is on an object store, and pictures are read from local files: mount it (gcsfuse) '
      'or copy it, and name the local folder'
    )
  return Path(path).expanduser()


def checksum(path: AnyPath) -> int:
  """CRC-32 of a local file."""
  value = 0
  with open(path, 'rb') as file:
    while block := file.read(1 << 22):
      value = zlib.crc32(block, value)
  return value


def write_atomic(path: os.PathLike[str], content: bytes) -> None:
  """Writes a file so that readers, also in other processes, see all of it or none.

  Nothing but the file itself is touched: what is written first has a name that nobody else has.

  Raises:
    OSError: it can't be written; what was there is still there.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = _beside(path)
  try:
    beside.write_bytes(content)
    beside.replace(path)
  except BaseException:
    beside.unlink(missing_ok=True)
    raise


def _beside(path: epath.Path) -> epath.Path:
  """A name in the same folder that no other process writes to."""
  if is_remote(path):
    return path.parent / f'.{path.name}.{os.getpid()}.part'
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix='.', suffix='.part')
  os.fchmod(handle, 0o644)  # temporary files are private
  os.close(handle)
  return epath.Path(temporary)


def put_aside(path: epath.Path, name: str, joint: str = '') -> str:
  """Renames a file or folder to `name`; where that is taken, `joint` and a number from 2 follow.

  Returns:
    The name that it has now.
  """
  free = first_free(path, name, joint)
  path.rename(free)
  return free.name


def first_free(path: epath.Path, name: str, joint: str = '') -> epath.Path:
  """The first name that nothing beside a path has yet: `name`, or with `joint` and a number."""
  numbered = (f'{name}{joint}{number}' for number in itertools.count(2))
  names = itertools.chain([name], numbered)
  return next(found for one in names if not (found := path.parent / one).exists())


def stable_hash(*parts: object) -> int:
  """A 63-bit number that depends on the parts alone: not on process, platform or version."""
  text = '\x1f'.join(str(part) for part in parts)
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') >> 1
