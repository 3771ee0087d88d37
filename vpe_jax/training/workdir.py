"""A run's folder: it can be written, and one run at a time has it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

import jax
from etils import epath

from vpe_jax.contracts import UserError
from vpe_jax.storage import is_remote

LOCK = '.lock'


@contextlib.contextmanager
def claimed(workdir: epath.Path) -> Iterator[None]:
  """Makes a run's folder and keeps other runs out of it until the block or the process ends.

  The system frees the lock however a process ends; its empty file stays. Process 0 takes it for
  all of its run. Object stores have no locks: there, nothing is done.

  Raises:
    UserError: the folder can't be written, or another process has it.
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
    # Some network file systems have no locks, which is no reason not to train there.
    print(f'warning: {workdir} could not be locked ({error.strerror}): start no second run there')
