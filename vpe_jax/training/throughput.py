"""How fast a run is: step time, images and tokens per second, model FLOPs utilisation, ETA.

Utilisation comes from the system's own FLOP formula, never from XLA's count, which leaves out
custom kernels and includes what rematerialisation repeats.
"""

from __future__ import annotations

import dataclasses
import time

import jax

from vpe_jax.config import Config
from vpe_jax.contracts import System
from vpe_jax.devices import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class StageWork:
  """What one step of a stage amounts to: steps in the stage, and examples, tokens, FLOPs a step."""

  steps: int
  examples: int
  tokens: int
  flops: float


def work_of(config: Config, system: System) -> tuple[StageWork, ...]:
  """The work of every stage of a run."""
  return tuple(
    StageWork(steps, batch, batch * system.tokens(stage), batch * system.flops(stage))
    for stage, steps, batch in zip(system.stages, config.steps, config.batch_size, strict=True)
  )


class Meter:
  """Times steps. What happens between `pause` and the next step's start isn't counted."""

  def __init__(self, work: tuple[StageWork, ...], device_count: int, device_kind: str):
    self._work = work
    self._device_count = device_count
    self._peak = PEAK_FLOPS.get(device_kind)
    self._mark = time.perf_counter()

  def restart(self) -> None:
    """Starts the clock anew, after work that is no part of a step."""
    self._mark = time.perf_counter()

  def lap(self, stage: int) -> dict[str, float]:
    """Speeds of the step that just ended: seconds, and rates per second over all devices."""
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
    """Seconds to the end of the run, if later stages run at the same FLOPs per second."""
    left = (self._work[stage].steps - stage_step) * seconds
    for work in self._work[stage + 1 :]:
      left += work.steps * seconds * work.flops / self._work[stage].flops
    return left


def meter(config: Config, system: System) -> Meter:
  """A meter for the devices that this process group has."""
  return Meter(work_of(config, system), jax.device_count(), jax.devices()[0].device_kind)
