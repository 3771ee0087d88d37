"""Stops a run on SIGTERM or Ctrl-C, at the same step in all processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from vpe_jax import interrupts, sharding

POLL = 0.1  # seconds between two looks for SIGTERM while nothing is unsaved
LEAVE_TIMEOUT = 10.0  # seconds in which all processes must notice SIGTERM to end together

_leaving = threading.Lock()
_calls = 0  # of sharding.preempted: the runs of a chain share one count


def _preempted() -> bool:
  """Whether all processes have received SIGTERM; true for the same number of calls in each."""
  global _calls
  _calls += 1
  return sharding.preempted(_calls)


class Preemption:
  """Context in which SIGTERM and Ctrl-C make the loop save and stop.

  If JAX's coordination service runs (vpe_jax.main starts it, also for one process), it handles
  the signal and all processes agree on the step at which they stop. Otherwise this context handles
  the signal. A second Ctrl-C stops immediately. Where nothing is unsaved, SIGTERM and the first
  Ctrl-C do, too.
  """

  def __init__(self) -> None:
    self.interrupted = False  # by Ctrl-C, in this process
    self._requested = False
    self._previous: dict[signal.Signals, Any] = {}
    self._second: Any = None  # handler of a second Ctrl-C
    # Only the main thread can set signal handlers.
    self._is_main = threading.current_thread() is threading.main_thread()
    self._handles_sigterm = self._is_main and not jax.distributed.is_initialized()
    self._cleanup = contextlib.ExitStack()

  def __enter__(self) -> Preemption:
    if self._is_main:
      self._cleanup.enter_context(self._first_interrupt_saves())
    if self._handles_sigterm:
      self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._cleanup.close()
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  @contextlib.contextmanager
  def nothing_unsaved(self) -> Iterator[None]:
    """Context without unsaved steps: Ctrl-C raises KeyboardInterrupt, SIGTERM ends the process.

    For example, while encoders fill the cache, whose complete shards are on disk. Compiled code may
    run for minutes, so a thread ends the process. With several processes, each must enter and leave
    this context, and SIGTERM to one ends all.
    """
    self._cleanup.close()
    try:
      with self._sigterm_ends_process():
        yield
    finally:
      if self._is_main:
        self._cleanup.enter_context(self._first_interrupt_saves())

  @contextlib.contextmanager
  def _sigterm_ends_process(self) -> Iterator[None]:
    if self._handles_sigterm:
      signal.signal(signal.SIGTERM, self._previous[signal.SIGTERM])
      try:
        yield
      finally:
        signal.signal(signal.SIGTERM, self._request)
    elif jax.distributed.is_initialized():
      watch = _Watch(self._leave)
      try:
        yield
        # Faster processes wait here for the others, and still end at SIGTERM.
        multihost_utils.sync_global_devices('nothing unsaved')
        watch.stop()
        is_over = watch.align()
      except BaseException:
        # A collective also fails because another process has ended.
        if watch.stop():
          self._leave()
        raise
      if is_over:
        self._leave()
    else:
      yield

  @contextlib.contextmanager
  def _first_interrupt_saves(self) -> Iterator[None]:
    with interrupts.first_is_free():
      self._second = signal.signal(signal.SIGINT, self._interrupt)
      try:
        yield
      finally:
        signal.signal(signal.SIGINT, self._second)

  def _leave(self) -> NoReturn:
    """Ends this process, together with all others."""
    _leaving.acquire()  # Never released: a second thread waits here for the end.
    if jax.process_index() == 0:
      print('preempted: no step is unsaved; the same command continues from there', flush=True)
    sharding.leave_together(LEAVE_TIMEOUT)
    interrupts.leave(signal.SIGINT if self.interrupted else signal.SIGTERM)

  def reached(self) -> bool:
    """Whether to save and stop now; the same in every process.

    Every process must call this at the same points, such as after each step.
    """
    return self._requested if self._handles_sigterm else _preempted()

  def _interrupt(self, number: int, frame: FrameType | None) -> None:
    print('saving and stopping after this step; press Ctrl-C again to stop now', flush=True)
    self.interrupted = True
    signal.signal(signal.SIGINT, self._second)
    os.kill(os.getpid(), signal.SIGTERM)  # SIGTERM reaches all processes.

  def _request(self, number: int, frame: FrameType | None) -> None:
    self._requested = True


class _Watch:
  """A thread that looks for SIGTERM while the main thread may run compiled code.

  Processes look independently of each other, so the numbers of their calls differ until `align`.
  The difference stays small: a busy process makes up for the looks that it missed.
  """

  def __init__(self, leave: Callable[[], NoReturn]):
    self._leave = leave
    self._reached = False
    self._lock = threading.Lock()  # held during a look
    self._stopped = threading.Event()
    threading.Thread(target=self._run, name='preemption', daemon=True).start()

  def stop(self) -> bool:
    """Ends the looks of the thread; returns whether it ends the process."""
    self._stopped.set()
    with self._lock:
      return self._reached

  def align(self) -> bool:
    """Makes all processes have the same number of calls; returns whether to end them."""
    last = int(multihost_utils.process_allgather(np.array(_calls)).max())
    # After a look that ends the process, its thread leaves the group: another look would fail.
    while _calls <= last and not self._reached:
      self._reached = _preempted()
    return self._reached

  def _run(self) -> None:
    first, start = _calls, time.monotonic()
    while not self._stopped.wait(POLL):
      with self._lock:
        if self._stopped.is_set():
          return
        due = first + int((time.monotonic() - start) / POLL)
        while _calls < due and not self._reached:
          self._reached = _preempted()
      if self._reached:
        self._leave()
