"""The least time that a step can take, and what sets it.

Each resource is taken to run at its peak the whole time, beside the others: no step is faster than
the slowest of them alone. Real steps are slower, as work waits for other work.
"""

from __future__ import annotations

import dataclasses

from vpe_jax.compilation.traffic import Work
from vpe_jax.devices import Chip


@dataclasses.dataclass(frozen=True)
class Bound:
  """Seconds that each resource needs for one step.

  Attributes:
    seconds: `compute`, `hbm`, `ici` and `dcn`.
    mfu: share of the chips' peak that model FLOPs reach in a step of the bound's length.
  """

  seconds: dict[str, float]
  mfu: float

  @property
  def by(self) -> str:
    """What binds."""
    return max(self.seconds, key=self.seconds.get)

  @property
  def step_time(self) -> float:
    """Seconds."""
    return self.seconds[self.by]


def bound(work: Work, kernel_flops: float, model_flops: float, chip: Chip) -> Bound:
  """The bound of a program.

  Args:
    work: of one chip.
    kernel_flops: on one chip, that `work` doesn't show.
    model_flops: on one chip, by the system's formula.
    chip: its figures.
  """
  across = sum(one.dcn_bytes for one in work.collectives)
  seconds = {
    'compute': (work.flops + kernel_flops) / chip.peak_flops,
    'hbm': work.hbm_bytes / chip.hbm_bandwidth,
    'ici': (sum(one.bytes for one in work.collectives) - across) / chip.ici_bandwidth,
    'dcn': across / chip.dcn_bandwidth,
  }
  slowest = max(seconds.values())
  return Bound(seconds, model_flops / chip.peak_flops / slowest if slowest else 0.0)
