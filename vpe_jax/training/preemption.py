"""Notices that the machine is about to be taken away (SIGTERM), on all processes at one step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

from vpe_jax import sharding


class Preemption:
  """A context in which SIGTERM asks the loop to save and stop instead of killing the process.

  Where JAX's coordination service runs (the front doors start it, also for one process) it
  catches the signal, and all processes agree on the step at which they stop. A run that was
  started from Python without it catches the signal itself.
  """

  def __init__(self) -> None:
    self._asked = False
    self._previous: Any = None
    # Signal handlers belong to the main thread; elsewhere the owner of that thread decides.
    self._catches = (
      not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread()
    )

  def __enter__(self) -> Preemption:
    if self._catches:
      self._previous = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if self._catches:
      signal.signal(signal.SIGTERM, self._previous)

  def reached(self, step: int) -> bool:
    """Whether to save and stop after this step; the same answer in every process."""
    return self._asked if self._catches else sharding.preempted(step)

  def _ask(self, number: int, frame: FrameType | None) -> None:
    self._asked = True
