"""Profiler traces of a range of steps, written to RUN/profile."""

from __future__ import annotations

import jax


class Profiler:
  """Traces the steps of a range; an empty one has no trace."""

  def __init__(self, steps: range, folder: str):
    self._steps, self._folder = steps, folder
    self._active = False
    self._traced_from = 0

  def before(self, step: int) -> None:
    """Starts the trace at the first step of the range. Call it before each step, from 1 on."""
    if step in self._steps and not self._active:
      jax.profiler.start_trace(self._folder)
      self._active, self._traced_from = True, step

  def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Ends the trace after the last step of the range. Call it after dispatching each step."""
    if self._active and step + 1 not in self._steps:
      jax.block_until_ready(metrics)
      self.close()
      print(f'profile: steps {self._traced_from} to {step} in {self._folder}', flush=True)

  def close(self) -> None:
    """Ends an active trace."""
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
