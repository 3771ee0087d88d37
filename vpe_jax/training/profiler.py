"""Profiler traces of a range of steps, written to RUN/profile."""

from __future__ import annotations

import jax

from vpe_jax.contracts import UserError


class Profiler:
  """Traces the steps of a range such as `10:13`: from the start of step 10 to the end of 12."""

  def __init__(self, steps: str, folder: str):
    """Parses the range.

    Args:
      steps: `FIRST:END`, steps FIRST to END - 1; '' never traces.
      folder: output folder.

    Raises:
      UserError: the range isn't two positive numbers in ascending order.
    """
    self._folder = folder
    self._active = False
    self._first, self._last = 0, 0
    if steps:
      first, _, last = steps.partition(':')
      if not (first.isdecimal() and last.isdecimal() and 0 < int(first) < int(last)):
        raise UserError(f"log.profile is '{steps}': name a range of steps such as 10:13")
      self._first, self._last = int(first), int(last)

  def before(self, step: int) -> None:
    """Starts the trace if the step is in the range. Call it before each step (from 1)."""
    if self._first <= step < self._last and not self._active:
      jax.profiler.start_trace(self._folder)
      self._active = True

  def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Ends the trace if this is its last step. Call it after dispatching each step."""
    if self._active and step + 1 >= self._last:
      jax.block_until_ready(metrics)
      self.close()
      print(f'profile: steps {self._first} to {step} in {self._folder}', flush=True)

  def close(self) -> None:
    """Ends an active trace."""
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
