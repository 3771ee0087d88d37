"""Figures over a set of images, and their 95 % intervals by resampling (the bootstrap).

A resample is N images, drawn with replacement from the N images. The interval of a figure spans the
central 95 % of its values over `RESAMPLES` resamples. They depend on N alone, so figures over the
same images are resampled together, and their difference has the interval of paired images.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

RESAMPLES = 1000
_SEED = 0
_TAILS = (0.025, 0.975)
METHOD = f'95 % intervals: percentiles of {RESAMPLES} resamples of the images with replacement'

# Maps weights [R, N], the number of times that each of N images is drawn, to values [R].
Statistic = Callable[[np.ndarray], np.ndarray]
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
  """A figure of N images, as a function of the weights of the images.

  Attributes:
    count: number N of images; of other units if the figure's docstring names them.
    statistic: see Statistic.
    resamples: number of resamples.
    is_share: whether the figure is a mean of values in [0, 1]. At exactly 0 and 1, where resamples
      don't vary, its interval is Wilson's.
    is_biased: whether resamples differ from the value on average, as they repeat images. Their
      percentiles are then shifted by the mean difference.
    is_difference: whether it is the difference of two figures.
  """

  count: int
  statistic: Statistic
  resamples: int = RESAMPLES
  is_share: bool = False
  is_biased: bool = False
  is_difference: bool = False

  @functools.cached_property
  def value(self) -> float:
    """The figure of the images, each with weight 1."""
    return float(self.statistic(np.ones((1, self.count)))[0])

  @functools.cached_property
  def interval(self) -> Interval | None:
    """The 95 % interval; None for a single image."""
    if self.count < 2:
      return None
    if self.is_share and self.value in (0.0, 1.0):
      return wilson_interval(self.value, self.count)
    low, high = np.quantile(self._resampled, _TAILS)
    return float(low - self.bias), float(high - self.bias)

  @property
  def bias(self) -> float:
    """Mean difference of resamples from the value if `is_biased`, else 0."""
    return float(np.mean(self._resampled)) - self.value if self.is_biased else 0.0

  @functools.cached_property
  def _resampled(self) -> np.ndarray:
    return self.statistic(draws(self.count, self.resamples))

  def _of(self, weights: np.ndarray) -> np.ndarray:
    """The statistic, which is computed only once for the figure's own resamples."""
    is_own = weights is draws(self.count, self.resamples)
    return self._resampled if is_own else self.statistic(weights)

  def __sub__(self, other: Figure) -> Figure:
    """The difference of two figures of the same images, which are resampled together.

    Raises:
      ValueError: the figures have different numbers of images.
    """
    if self.count != other.count:
      raise ValueError(f'{self.count} and {other.count} images are no pairs')
    return Figure(
      self.count,
      lambda weights: self._of(weights) - other._of(weights),
      min(self.resamples, other.resamples),
      is_biased=self.is_biased or other.is_biased,
      is_difference=True,
    )

  def summary(self) -> dict[str, Any]:
    """Plain numbers, for JSON; None if they are not finite."""
    is_finite = self.interval is not None and all(map(math.isfinite, self.interval))
    return {
      'value': self.value if math.isfinite(self.value) else None,
      'interval95': list(self.interval) if is_finite else None,
    }


def mean(values: np.ndarray) -> Figure:
  """The mean of one value for each image, [N]."""
  return ratio(values, np.ones(len(values)))


def share(values: np.ndarray) -> Figure:
  """The mean of one value in [0, 1] for each image, [N] bool or float."""
  return dataclasses.replace(mean(values), is_share=True)


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Figure:
  """The quotient of two sums over images, both [N]; 0 if the second sum is 0."""
  above, below = (np.asarray(x, np.float64) for x in (numerators, denominators))

  def statistic(weights: np.ndarray) -> np.ndarray:
    total = weights @ below
    return np.divide(weights @ above, total, out=np.zeros_like(total), where=total != 0)

  return Figure(len(above), statistic)


@functools.lru_cache(maxsize=8)
def draws(count: int, resamples: int) -> np.ndarray:
  """Weights float64 [resamples, count]: how often each of `count` images is drawn."""
  rng = np.random.default_rng(_SEED)
  return rng.multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)


def wilson_interval(share: float, count: int, z: float = 1.96) -> Interval:
  """Wilson score interval of a share of `count` observations; 95 % by default."""
  centre = share + z * z / (2 * count)
  half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  scale = 1 + z * z / count
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
