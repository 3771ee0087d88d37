"""Roofline bound: the minimum time of a step and the resource that limits it.

Each resource is assumed to run at its peak, fully overlapped with the others, so a step takes at
least as long as the slowest resource. Real steps are slower because of dependencies.
"""

from __future__ import annotations

import dataclasses

from vpe_jax.compilation.traffic import Work
from vpe_jax.devices import Chip


@dataclasses.dataclass(frozen=True)
class Bound:
  """Lower bound on the time of a step.

  Attributes:
    seconds: time that each resource needs: `compute`, `hbm`, `ici` and `dcn`.
    mfu: model FLOPs utilization of a step that takes the minimum time.
  """

  seconds: dict[str, float]
  mfu: float

  @property
  def resource(self) -> str:
    """The limiting resource."""
    return max(self.seconds, key=self.seconds.get)

  @property
  def step_time(self) -> float:
    """Minimum time of a step in seconds."""
    return self.seconds[self.resource]


def bound(work: Work, kernel_flops: float, model_flops: float, chip: Chip) -> Bound:
  """Computes the bound of a program.

  Args:
    work: FLOPs and traffic of one device.
    kernel_flops: FLOPs of one device in custom kernels, which are not in `work`.
    model_flops: model FLOPs of one step, divided by the number of devices.
    chip: specifications of the chip.
  """
  dcn_bytes = sum(collective.dcn_bytes for collective in work.collectives)
  received = sum(collective.bytes for collective in work.collectives)
  seconds = {
    'compute': (work.flops + kernel_flops) / chip.peak_flops,
    'hbm': work.hbm_bytes / chip.hbm_bandwidth,
    'ici': (received - dcn_bytes) / chip.ici_bandwidth,
    'dcn': dcn_bytes / chip.dcn_bandwidth,
  }
  slowest = max(seconds.values())
  return Bound(seconds, model_flops / chip.peak_flops / slowest if slowest else 0.0)
