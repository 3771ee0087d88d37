"""Profiler traces of a range of steps, written to RUN/profile."""

from __future__ import annotations

import jax

from vpe_jax.contracts import UserError


class Profiler:
  """Traces the steps of a range such as `10:13`: steps 10, 11 and 12."""

  def __init__(self, steps: str, folder: str):
    """Parses the range.

    Args:
      steps: `FIRST:END`, steps FIRST to END - 1; '' for no trace.
      folder: output folder.

    Raises:
      UserError: the range isn't two positive numbers in ascending order.
    """
    self._folder = folder
    self._active = False
    self._first, self._end = 0, 0
    self._traced_from = 0
    if steps:
      first, _, end = steps.partition(':')
      if not (first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
        raise UserError(f"log.profile is '{steps}': name a range of steps such as 10:13")
      self._first, self._end = int(first), int(end)

  def before(self, step: int) -> None:
    """Starts the trace at the first step of the range. Call it before each step, from 1 on."""
    if self._first <= step < self._end and not self._active:
      jax.profiler.start_trace(self._folder)
      self._active, self._traced_from = True, step

  def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Ends the trace after the last step of the range. Call it after dispatching each step."""
    if self._active and step + 1 >= self._end:
      jax.block_until_ready(metrics)
      self.close()
      print(f'profile: steps {self._traced_from} to {step} in {self._folder}', flush=True)

  def close(self) -> None:
    """Ends an active trace."""
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
