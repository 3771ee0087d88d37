"""The folder of a run: its lock, so that only one run at a time uses it, and its cache."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

import jax
from etils import epath

from vpe_jax.contracts import UserError
from vpe_jax.storage import is_remote

LOCK = '.lock'
CACHE = 'compilation_cache'  # compiled programs, which a resumed run reads


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Creates a run's folder and locks it until the block or the process ends.

  Process 0 holds the lock for all processes of a run. The operating system releases it when that
  process ends; the empty lock file remains. Object stores have no locks, so remote folders are not
  locked.

  Raises:
    UserError: the folder can't be written, or another process holds its lock.
  """
  if is_remote(workdir) or jax.process_index() != 0:
    yield
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / LOCK, 'a', encoding='utf-8')
  except OSError as error:
    raise UserError(
      f'cannot write to {workdir} ({error.strerror}): choose another --workdir'
    ) from error
  with file:
    _lock(file.fileno(), workdir)
    yield


def _lock(descriptor: int, workdir: epath.Path) -> None:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(
      f'{workdir} is in use by another process: wait for it, or choose another --workdir'
    ) from error
  except OSError as error:
    # Some network file systems have no locks; training works there without one.
    print(
      f'warning: {workdir} could not be locked ({error.strerror}): do not start a second run in it'
    )
