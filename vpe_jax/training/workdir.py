"""The folder of a run: its lock, so that only one run at a time uses it, and its cache."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from typing import TextIO

import jax
from etils import epath

from vpe_jax import sharding
from vpe_jax.contracts import UserError
from vpe_jax.storage import is_remote

LOCK = '.lock'
CACHE = 'compilation_cache'  # compiled programs, which a resumed run reads


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Creates a run's local folder and locks it until the block or the process ends.

  Process 0 creates the folder and holds the lock for all processes of a run. The operating system
  releases it when that process ends; the empty lock file remains. Object stores have no locks:
  nothing is done for remote folders.

  Raises:
    UserError: in all processes, the folder can't be written, or another run holds its lock.
  """
  with contextlib.ExitStack() as held:
    problem = ''
    if jax.process_index() == 0 and not is_remote(workdir):
      try:
        file = held.enter_context(_opened(workdir))
        _lock(file.fileno(), workdir)
      except UserError as error:
        problem = str(error)
    if problem := sharding.gather_texts(problem)[0]:
      raise UserError(problem)
    yield


def _opened(workdir: epath.Path) -> TextIO:
  """The lock file of a folder, which is created."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    return open(workdir / LOCK, 'a', encoding='utf-8')
  except OSError as error:
    raise UserError(
      f'cannot write to {workdir} ({error.strerror}): choose another --workdir'
    ) from error


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
