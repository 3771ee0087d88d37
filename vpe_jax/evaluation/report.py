"""What benchmarks are given and what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vpe_jax.data.records import Split
from vpe_jax.sampling.plans import Plans


@dataclasses.dataclass(frozen=True)
class Planner:
  """What writes visual prompts, with the seed and the settings of the evaluation in it.

  Attributes:
    plan: (captions, n) -> n plans of each caption.
    score: (plans, ranker) -> float [n], higher is better.
    render: plans -> pictures [n, R, R, 3] uint8.
    read: pictures -> their own visual prompts [n, P].
    rankers: those that `score` takes.
  """

  plan: Callable[[list[str], int], Plans]
  score: Callable[[Plans, str], np.ndarray]
  render: Callable[[Plans], np.ndarray]
  read: Callable[[np.ndarray], np.ndarray]
  rankers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is evaluated.

  Attributes:
    draw: captions -> pictures [N, R, R, 3] uint8, one each.
    image_size: R.
    description: what a report should say about it: checkpoint, settings, version.
    planner: of its visual prompts; None where it has none.
  """

  draw: Callable[[list[str]], np.ndarray]
  image_size: int
  description: Mapping[str, str]
  planner: Planner | None = None


@dataclasses.dataclass(frozen=True)
class Options:
  """How much is evaluated.

  Attributes:
    captions: captions of each split.
    splits: held-out splits of the scenes.
    seed: of the scenes and their distractors.
    judge: where the judge's weights are.
    best_of: plans written for each caption, in the benchmark of that name.
    mixes: pairs of plans of each split that are mixed, in the benchmark of that name.
  """

  captions: int = 512
  splits: tuple[Split, ...] = ('combination', 'concept')
  seed: int = 0
  judge: str = 'assets:judge'
  best_of: int = 0
  mixes: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
  """What a benchmark found: lines to print, a JSON-able protocol, and sheets of pictures."""

  lines: tuple[str, ...]
  protocol: Mapping[str, Any]
  sheets: Mapping[str, Any]
