"""Step-dependent weights: the progressive schedule of VPE (arXiv 2606.04457, Eq. 2 and 3).

Eq. 2 hides less and less of a discrete visual prompt, Eq. 3 gives the cross-entropy beside a flow
loss more and more weight. Both go from a start to an end value along the same curve.
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
  """A value by any of the schedules that the paper compares or that control for them.

  Attributes:
    kind: `sigmoid` (the paper's), `linear`, `constant` (the start value at every step), or `off`.
    total: steps S of the stage.
    start: value that the curve comes from.
    end: value that it goes to. The sigmoid comes near both and reaches neither.
    off: value of a run that has no schedule: 0 where Eq. 2 hides tokens, 1 where Eq. 3 weighs a
      loss.
  """

  kind: str
  total: int
  start: float
  end: float
  off: float

  def at(self, step: Array | int) -> Array:
    """The value at a step of the stage, a float32 scalar; beyond `total` the one there holds.

    Raises:
      KeyError: there is no such schedule.
    """
    fixed = {'constant': self.start, 'off': self.off}
    if self.kind in fixed:
      return jnp.float32(fixed[self.kind])
    return CURVES[self.kind](step, self.total, self.start, self.end)

  def __str__(self) -> str:
    fixed = {'constant': self.start, 'off': self.off}
    if self.kind in fixed:
      return f'{fixed[self.kind]:g}'
    return f'{self.start:g} to {self.end:g} ({self.kind})'


def sigmoid_schedule(
  step: Array | int, total: int, start: float, end: float, steepness: float = STEEPNESS
) -> Array:
  """start (1 - s) + end s with s = sigmoid(steepness (step / total - 1/2)); float32.

  Beyond `total` the value at `total` holds.
  """
  return _between(jax.nn.sigmoid(steepness * (_progress(step, total) - 0.5)), start, end)


def linear_schedule(step: Array | int, total: int, start: float, end: float) -> Array:
  """start (1 - s) + end s with s = step / total, at most 1; float32."""
  return _between(_progress(step, total), start, end)


# Curves from a start to an end value, by step and number of steps.
CURVES: dict[str, Callable[[Array | int, int, float, float], Array]] = {
  'sigmoid': sigmoid_schedule,
  'linear': linear_schedule,
}
KINDS = (*CURVES, 'constant', 'off')


def _progress(step: Array | int, total: int) -> Array:
  return jnp.minimum(jnp.asarray(step, jnp.float32) / total, 1.0)


def _between(share: Array, start: float, end: float) -> Array:
  return start * (1.0 - share) + end * share
