"""Ctrl-C ends a command within seconds: during imports, in compiled code, and anywhere else.

Python runs signal handlers between two bytecodes of the main thread. Compiling a program is a
single call of many seconds, and an import may turn an exception into another one. So while the
modules of a command are imported, Ctrl-C ends the process at once. After that it raises
KeyboardInterrupt, and a thread ends the process if this takes too long, or at a second Ctrl-C.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT  # exit status, as in a shell
_ENDINGS = {signal.SIGINT: 'interrupted', signal.SIGTERM: 'terminated'}
GRACE = 3.0  # seconds between Ctrl-C and the end of the process

_free = threading.Semaphore(0)  # signals that don't end the process
_leaving = threading.Lock()


def exit_at_once() -> None:
  """Makes Ctrl-C end the process without an exception, until `watch` is called."""
  signal.signal(signal.SIGINT, lambda number, frame: leave())


def watch() -> None:
  """Makes Ctrl-C raise KeyboardInterrupt; the process ends at the latest GRACE seconds later.

  Only the main thread may call it, once.
  """
  received, sent = os.pipe()
  os.set_blocking(sent, False)
  # Python writes the signal's number at once, also while the main thread runs compiled code.
  signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
  signal.signal(signal.SIGINT, _raise)
  threading.Thread(target=_end_in_time, args=(received,), daemon=True).start()


@contextlib.contextmanager
def first_is_free() -> Iterator[None]:
  """Context that handles the first Ctrl-C by itself; the process goes on."""
  _free.release()
  try:
    yield
  finally:
    _free.acquire(blocking=False)


def leave(number: signal.Signals = signal.SIGINT) -> NoReturn:
  """Ends the process with one line and the status of a signal; only child processes are ended."""
  _leaving.acquire()  # Never released: a second thread waits here for the end.
  if threading.current_thread() is threading.main_thread():
    # A handler would interrupt this function, and the exit status would be lost.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  for child in multiprocessing.active_children():  # They would wait for this process forever.
    child.terminate()
  # The reader of a stream may have ended; then nothing can be written to it.
  with contextlib.suppress(OSError, ValueError):
    print(_ENDINGS[number], file=sys.stderr)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
  raise KeyboardInterrupt


def _end_in_time(received: int) -> None:
  while os.read(received, 1)[0] != signal.SIGINT or _free.acquire(blocking=False):
    continue
  select.select([received], [], [], GRACE)  # Returns early at the next signal.
  leave()
