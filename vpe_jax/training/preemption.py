"""Notices that a run should end (SIGTERM, Ctrl-C), on all processes at one step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

from vpe_jax import sharding


class Preemption:
  """A context in which SIGTERM and Ctrl-C ask the loop to save and stop.

  Where JAX's coordination service runs (the front doors start it, also for one process) it
  catches the signal, and all processes agree on the step at which they stop. A run that was
  started from Python without it catches the signal itself. A second Ctrl-C stops at once.
  """

  def __init__(self) -> None:
    self._asked = False
    self._previous: dict[signal.Signals, Any] = {}
    # Signal handlers belong to the main thread; elsewhere the owner of that thread decides.
    self._is_main = threading.current_thread() is threading.main_thread()
    self._catches = self._is_main and not jax.distributed.is_initialized()

  def __enter__(self) -> Preemption:
    if self._is_main:
      self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
    if self._catches:
      self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def reached(self, step: int) -> bool:
    """Whether to save and stop after this step; the same answer in every process."""
    return self._asked if self._catches else sharding.preempted(step)

  def _interrupt(self, number: int, frame: FrameType | None) -> None:
    print('stops after this step, saved; Ctrl-C again stops at once', flush=True)
    signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
    os.kill(os.getpid(), signal.SIGTERM)  # All processes hear of it, wherever it was caught.

  def _ask(self, number: int, frame: FrameType | None) -> None:
    self._asked = True
