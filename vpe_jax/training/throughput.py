"""Throughput of a run: step time, images and tokens per second, model FLOPs utilization, ETA.

Utilization is based on model FLOPs (model_flops.py), not on XLA's count, which excludes custom
kernels and includes rematerialization.
"""

from __future__ import annotations

import dataclasses
import time

import jax

from vpe_jax.config import Config
from vpe_jax.contracts import System
from vpe_jax.devices import PEAK_FLOPS
from vpe_jax.training.model_flops import step_flops


@dataclasses.dataclass(frozen=True)
class StageWork:
  """Work of a stage: number of steps, and examples, tokens and FLOPs per step."""

  steps: int
  examples: int
  tokens: int
  flops: float


def work_of(config: Config, system: System) -> tuple[StageWork, ...]:
  """Work of each stage of a run."""
  return tuple(
    StageWork(steps, batch, batch * system.tokens(stage), step_flops(system, stage, batch).total)
    for stage, steps, batch in zip(system.stages, config.steps, config.batch_size, strict=True)
  )


class Meter:
  """Measures the time of steps; `restart` excludes the time since the last step."""

  def __init__(self, work: tuple[StageWork, ...], device_count: int, device_kind: str):
    self._work = work
    self._device_count = device_count
    self._peak = PEAK_FLOPS.get(device_kind)
    self._mark = time.perf_counter()

  def restart(self) -> None:
    """Restarts the clock after work that is not part of a step."""
    self._mark = time.perf_counter()

  def lap(self, stage: int) -> dict[str, float]:
    """Time of the step that just ended, in seconds, and rates per second over all devices."""
    now = time.perf_counter()
    seconds, self._mark = max(now - self._mark, 1e-9), now
    work = self._work[stage]
    speeds = {
      'step_time': seconds,
      'images_per_s': work.examples / seconds,
      'tokens_per_s': work.tokens / seconds,
      'tflops_per_s': work.flops / seconds / 1e12,
    }
    if self._peak is not None:
      speeds['mfu'] = work.flops / seconds / (self._peak * self._device_count)
    return speeds

  def remaining(self, stage: int, stage_step: int, seconds: float) -> float:
    """Seconds until the end of the run, if later stages run at the same FLOPs per second."""
    left = (self._work[stage].steps - stage_step) * seconds
    for work in self._work[stage + 1 :]:
      left += work.steps * seconds * work.flops / self._work[stage].flops
    return left


def meter(config: Config, system: System) -> Meter:
  """A meter for all devices of the run."""
  return Meter(work_of(config, system), jax.device_count(), jax.devices()[0].device_kind)
