"""Stops a run on SIGTERM or Ctrl-C, at the same step in all processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax

from vpe_jax import interrupts, sharding


class Preemption:
  """Context in which SIGTERM and Ctrl-C make the loop save and stop.

  If JAX's coordination service runs (vpe_jax.main starts it, also for one process), it handles
  the signal and all processes agree on the step at which they stop. Otherwise this context handles
  the signal. A second Ctrl-C stops immediately, as does the first where nothing is unsaved.
  """

  def __init__(self) -> None:
    self.interrupted = False  # by Ctrl-C, in this process
    self._requested = False
    self._calls = 0  # of `reached`
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
    """Context without unsaved steps, in which Ctrl-C raises KeyboardInterrupt at once."""
    self._cleanup.close()
    try:
      yield
    finally:
      if self._is_main:
        self._cleanup.enter_context(self._first_interrupt_saves())

  @contextlib.contextmanager
  def _first_interrupt_saves(self) -> Iterator[None]:
    with interrupts.first_is_free():
      self._second = signal.signal(signal.SIGINT, self._interrupt)
      try:
        yield
      finally:
        signal.signal(signal.SIGINT, self._second)

  def reached(self) -> bool:
    """Whether to save and stop now; the same in every process.

    Every process must call this at the same points, such as after each step.
    """
    self._calls += 1
    return self._requested if self._handles_sigterm else sharding.preempted(self._calls)

  def _interrupt(self, number: int, frame: FrameType | None) -> None:
    print('saving and stopping after this step; press Ctrl-C again to stop now', flush=True)
    self.interrupted = True
    signal.signal(signal.SIGINT, self._second)
    os.kill(os.getpid(), signal.SIGTERM)  # SIGTERM reaches all processes.

  def _request(self, number: int, frame: FrameType | None) -> None:
    self._requested = True
