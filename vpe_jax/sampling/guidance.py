"""Guidance: a weighted sum of branches; each is the network's output without some conditions.

Branches are stacked along the batch, so that one call of the network computes all of them. The set
of branches is static; `Guidance.needed` leaves out those of weight 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, UserError

SCHEDULES = ('constant', 'linear')
RENORMALIZATIONS = ('', 'global', 'channel')
_MIN_NORM = 1e-8  # as in BAGEL; keeps the quotient of two norms finite


@dataclasses.dataclass(frozen=True)
class Branch:
  """One term of guidance.

  Attributes:
    name: such as `conditional` or `null`.
    weight: weight at full strength of guidance.
    dropped: names of the conditions that this branch drops.
  """

  name: str
  weight: float
  dropped: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Branches, and how their weights depend on time and step. Static under jit.

  Attributes:
    branches: the conditional branch, which drops nothing, then the others; the weights sum to 1.
    interval: times (lowest, highest] in which guidance is on (arXiv 2404.07724; BAGEL's
      `cfg_interval`); elsewhere only the conditional branch is used.
    schedule: strength f over the G steps (or the groups of a decoder): `constant`, or `linear`,
      from 1 at the first to 1/G at the last. A branch of weight w gets f w, the conditional branch
      1 + f (w - 1). For classifier-free guidance of scale s, this is VGT's scale
      1 + (s - 1)(G - g)/G at step g.
    renormalize: scales the guided output down to the norm of the conditional branch, as BAGEL's
      `cfg_renorm_type`: `global` (one norm per batch element), `channel` (one norm per vector along
      the last axis, in BAGEL a patch token), or '' (off).
    renormalize_min: minimum of the factor by which `renormalize` scales, BAGEL's `cfg_renorm_min`.

  Raises:
    UserError: a setting is out of range.
    ValueError: names repeat, the first branch drops a condition, or the weights don't sum to 1.
  """

  branches: tuple[Branch, ...]
  interval: tuple[float, float] = (0.0, 1.0)
  schedule: str = 'constant'
  renormalize: str = ''
  renormalize_min: float = 0.0

  def __post_init__(self) -> None:
    weights = {branch.name: branch.weight for branch in self.branches}
    if len(weights) != len(self.branches) or self.branches[0].dropped:
      raise ValueError(f'{self.branches}: names must differ, and the first branch drops nothing')
    if not all(map(math.isfinite, weights.values())):
      raise UserError(f'guidance has the weights {weights}: its scales must be finite numbers')
    if not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
      raise ValueError(f'weights of guidance are {weights}: they must sum to 1')
    low, high = self.interval
    if not 0 <= low <= high <= 1:
      raise UserError(
        f'the guidance interval is {self.interval}: give two times, 0 <= lowest <= highest <= 1'
      )
    for name, known in (('schedule', SCHEDULES), ('renormalize', RENORMALIZATIONS)):
      if (value := getattr(self, name)) not in known:
        listed = ', '.join(map(repr, known))
        raise UserError(f'guidance {name} is {value!r}: it must be one of {listed}')
    if not 0 <= self.renormalize_min <= 1:
      raise UserError(
        f'guidance renormalize_min is {self.renormalize_min}: it must be between 0 and 1'
      )

  @classmethod
  def classifier_free(
    cls, scale: float, dropped: frozenset[str] = frozenset({'condition'}), **settings: Any
  ) -> Guidance:
    """Classifier-free guidance (arXiv 2207.12598): null + scale (conditional - null).

    As in Show-o2 and BAGEL, scale 1 is off. Because it is computed as a weighted sum, scale 1 is
    exactly the conditional branch, and scale 0 exactly the null branch.

    Args:
      scale: guidance scale.
      dropped: the conditions that the null branch drops.
      settings: other fields of `Guidance`.
    """
    branches = Branch('conditional', scale), Branch('null', 1.0 - scale, dropped)
    return cls(branches, **settings)

  @classmethod
  def edit(
    cls, text: float, image: float, instruction: str, source: str, **settings: Any
  ) -> Guidance:
    """InstructPix2Pix: null + image (reference - null) + text (conditional - reference).

    The reference branch has the source image but no instruction, the null branch has neither (arXiv
    2211.09800). No null branch is computed if `image` is 1, no reference branch if both scales are
    equal, and only the conditional branch if both are 1.

    Args:
      text: scale of the instruction.
      image: scale of the source image.
      instruction: name of the condition that the reference branch drops.
      source: name of the other condition that the null branch drops.
      settings: other fields of `Guidance`.
    """
    branches = (
      Branch('conditional', text),
      Branch('reference', image - text, frozenset({instruction})),
      Branch('null', 1.0 - image, frozenset({instruction, source})),
    )
    return cls(branches, **settings)

  @property
  def conditional(self) -> Branch:
    """The branch that drops nothing."""
    return self.branches[0]

  @property
  def needed(self) -> tuple[Branch, ...]:
    """Branches to compute, in order: those with a weight other than 0.

    The conditional one is always included if the schedule varies or `renormalize` is on.
    """
    needed = {branch.name for branch in self.branches if branch.weight}
    if self.renormalize or self.schedule != 'constant':
      needed.add(self.conditional.name)
    return tuple(branch for branch in self.branches if branch.name in needed)

  def acts(self, times: np.ndarray) -> np.ndarray:
    """Whether guidance is on at times [S]: bool [S]."""
    low, high = self.interval
    return (low < times) & (times <= high)

  def weights(self, step: Array | int = 0, steps: int = 1) -> dict[str, Array | float]:
    """Weights by branch name at `step` of `steps`; Python floats for a constant schedule."""
    if self.schedule == 'constant':
      return {branch.name: branch.weight for branch in self.branches}
    strength = (steps - jnp.asarray(step, jnp.float32)) / steps
    weights = {branch.name: strength * branch.weight for branch in self.branches}
    conditional = self.conditional
    return weights | {conditional.name: 1.0 + strength * (conditional.weight - 1.0)}


UNGUIDED = Guidance((Branch('conditional', 1.0),))  # the conditional branch alone


def stacked(*guidances: Guidance) -> tuple[Branch, ...]:
  """The stacked branches of a decoder: the conditional one, and all that any guidance needs.

  Args:
    guidances: one for each run of consecutive tokens; only the weights of their branches differ.
  """
  names = {branch.name for guidance in guidances for branch in guidance.needed}
  first, *others = guidances[0].branches
  return first, *(branch for branch in others if branch.name in names)


def combine(
  guidance: Guidance,
  stacked: Array,
  branches: Sequence[Branch],
  step: Array | int = 0,
  steps: int = 1,
) -> Array:
  """The guided output [B, ...] float32: the weighted sum of the branches' outputs.

  Args:
    guidance: weights of the branches.
    stacked: outputs of n branches, [n B, ...]: B of the first, B of the second, and so on.
    branches: the n branches, including all that `guidance` needs.
    step: index of the step, from 0, for the schedule.
    steps: number of steps.
  """
  weights = guidance.weights(step, steps)
  parts = jnp.split(stacked.astype(jnp.float32), len(branches))
  outputs = {branch.name: part for branch, part in zip(branches, parts, strict=True)}
  needed = guidance.needed
  guided = sum(weights[branch.name] * outputs[branch.name] for branch in needed)
  if not guidance.renormalize or needed == (guidance.conditional,):
    return guided
  axes = tuple(range(1, guided.ndim)) if guidance.renormalize == 'global' else (-1,)
  norm = lambda x: jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))
  factor = norm(outputs[guidance.conditional.name]) / (norm(guided) + _MIN_NORM)
  return guided * jnp.clip(factor, guidance.renormalize_min, 1.0)
