"""Groups of sampling settings, from which systems compose a config's `sample` section.

The section of a system is its class `Sampling`, a dataclass that inherits the groups below and adds
its own fields. Flags of the front doors are derived from the fields and their documentation.
"""

from __future__ import annotations

import dataclasses
import math

from vpe_jax.config import SampleConfig, check, check_positive


@dataclasses.dataclass(frozen=True)
class FlowSampling(SampleConfig):
  """Settings of a flow sampler.

  Attributes:
    steps: number of steps of the flow.
    shift: factor by which the flow's times are shifted towards noise; 1 leaves them evenly spaced.
    guidance: classifier-free guidance scale of the image; 1 is off, 0 is unconditional.
  """

  steps: int = 25
  shift: float = 3.0
  guidance: float = 3.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive(self, 'sample.', 'shift')
    check_scales(self, 'guidance')


@dataclasses.dataclass(frozen=True)
class TokenSampling(SampleConfig):
  """Settings of a token sampler.

  Attributes:
    temperature: divisor of the tokens' logits; 0 is greedy.
    top_k: sample from the k most likely tokens; 0 is off.
    top_p: sample from the most likely tokens up to this total probability; 1 is off.
    min_p: sample from tokens with at least this fraction of the largest probability; 0 is off.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.03

  def __post_init__(self) -> None:
    super().__post_init__()
    valid = 0 <= self.temperature < math.inf
    check(self, 'sample.', 'temperature', valid, '0 (greedy) or a positive number')
    check(self, 'sample.', 'top_p', 0 < self.top_p <= 1, 'above 0 and at most 1 (off)')
    check(self, 'sample.', 'min_p', 0 <= self.min_p <= 1, 'between 0 (off) and 1')


def check_scales(section: SampleConfig, *names: str) -> None:
  """Raises a UserError if a guidance scale is infinite or NaN."""
  for name in names:
    check(section, 'sample.', name, math.isfinite(getattr(section, name)), 'a finite number')
