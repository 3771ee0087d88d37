"""Sampling settings that systems compose: the fields of a config's `sample` section.

A system names its section `Sampling`: a dataclass that inherits the groups below which its sampler
reads, and adds its own fields. Flags of the front doors derive from the fields and their docs.
"""

from __future__ import annotations

import dataclasses
import math

from vpe_jax.config import SampleConfig, check


@dataclasses.dataclass(frozen=True)
class FlowSampling(SampleConfig):
  """Settings of a sampler of flows.

  Attributes:
    steps: number of steps of the flow.
    shift: factor by which the flow's times are shifted towards noise; 1 leaves them evenly spaced.
    guidance: classifier-free guidance scale of the image; 1 is off, 0 leaves the condition out.
  """

  steps: int = 25
  shift: float = 3.0
  guidance: float = 3.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check(self, 'sample.', 'shift', 0 < self.shift < math.inf, 'a positive number')
    check_scales(self, 'guidance')


@dataclasses.dataclass(frozen=True)
class TokenSampling(SampleConfig):
  """Settings of a sampler of tokens.

  Attributes:
    temperature: divisor of the tokens' logits; 0 is greedy.
    top_k: sample from the k likeliest tokens; 0 is off.
    top_p: sample from the likeliest tokens up to this total probability; 1 is off.
    min_p: sample from tokens of at least this share of the likeliest one's probability; 0 is off.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.03

  def __post_init__(self) -> None:
    super().__post_init__()
    good = 0 <= self.temperature < math.inf
    check(self, 'sample.', 'temperature', good, '0 (greedy) or a positive number')
    check(self, 'sample.', 'top_p', 0 < self.top_p <= 1, 'above 0 and at most 1 (off)')
    check(self, 'sample.', 'min_p', 0 <= self.min_p <= 1, 'between 0 (off) and 1')


def check_scales(section: SampleConfig, *names: str) -> None:
  """Refuses guidance scales that are infinite or NaN."""
  for name in names:
    check(section, 'sample.', name, math.isfinite(getattr(section, name)), 'a finite number')
