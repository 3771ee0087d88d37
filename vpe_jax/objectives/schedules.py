"""Schedules of step-dependent values, such as mask rates and loss weights.

The sigmoid is the progressive schedule of arXiv 2606.04457: Eq. 2 decreases the fraction of masked
tokens, Eq. 3 increases the weight of the cross-entropy beside a flow loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array

STEEPNESS = 10.0  # k of the paper


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A value that depends on the step of a stage.

  Attributes:
    kind: `sigmoid`, `linear`, `constant` (the start value at every step), or `off`.
    total: number of steps of the stage.
    start: start value. The sigmoid approaches start and end value without reaching them.
    end: end value.
    off: value of kind `off`: 0 for a mask rate, 1 for a loss weight.
  """

  kind: str
  total: int
  start: float
  end: float
  off: float

  def at(self, step: Array | int) -> Array:
    """The value at a step of the stage, a float32 scalar; constant from step `total` on.

    Raises:
      KeyError: the kind is unknown.
    """
    if self.kind in _FIXED:
      return jnp.float32(getattr(self, _FIXED[self.kind]))
    return CURVES[self.kind](step, self.total, self.start, self.end)

  def __str__(self) -> str:
    if self.kind in _FIXED:
      return f'{getattr(self, _FIXED[self.kind]):g}'
    return f'{self.start:g} to {self.end:g} ({self.kind})'


def sigmoid_schedule(
  step: Array | int, total: int, start: float, end: float, steepness: float = STEEPNESS
) -> Array:
  """start (1 - s) + end s with s = sigmoid(steepness (step / total - 1/2)); float32.

  It is constant from step `total` on.
  """
  return _between(jax.nn.sigmoid(steepness * (_progress(step, total) - 0.5)), start, end)


def linear_schedule(step: Array | int, total: int, start: float, end: float) -> Array:
  """start (1 - s) + end s with s = step / total, at most 1; float32."""
  return _between(_progress(step, total), start, end)


# (step, total, start, end) -> value
CURVES: dict[str, Callable[[Array | int, int, float, float], Array]] = {
  'sigmoid': sigmoid_schedule,
  'linear': linear_schedule,
}
_FIXED = {'constant': 'start', 'off': 'off'}  # kind -> field with its value
KINDS = (*CURVES, *_FIXED)


def _progress(step: Array | int, total: int) -> Array:
  return jnp.minimum(jnp.asarray(step, jnp.float32) / total, 1.0)


def _between(share: Array, start: float, end: float) -> Array:
  return start * (1.0 - share) + end * share
