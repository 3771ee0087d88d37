"""What benchmarks are given and what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.records import Record, Source, Split
from vpe_jax.sampling.plans import Plans

Task = Literal['captions', 'classes', 'words', 'edits']

_SHOWN = 8  # pictures of each row of a sheet


@dataclasses.dataclass(frozen=True)
class Planner:
  """What writes visual prompts, with the seed and the settings of the evaluation in it.

  Attributes:
    plan: (captions, n) -> n plans of each caption.
    score: (plans, ranker) -> float [n], higher is better.
    render: plans -> pictures [n, R, R, 3] uint8.
    read: (pictures, captions) -> the pictures' own plans, told the captions.
    rankers: those that `score` takes.
  """

  plan: Callable[[list[str], int], Plans]
  score: Callable[[Plans, str], np.ndarray]
  render: Callable[[Plans], np.ndarray]
  read: Callable[[np.ndarray, Sequence[str]], Plans]
  rankers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is evaluated.

  Attributes:
    draw: captions -> pictures [N, R, R, 3] uint8, one each; those of one caption differ.
    image_size: R.
    description: what a report should say about it: checkpoint, settings, version.
    planner: of its visual prompts; None where it has none.
    task: what it draws from: captions of things, classes, captions of words, or instructions.
    editing: pictures before [N, R, R, 3] uint8 -> what draws and plans edits of them, one each;
      None where it doesn't edit.
    data: what it was trained on; None where nothing says.
  """

  draw: Callable[[list[str]], np.ndarray]
  image_size: int
  description: Mapping[str, str]
  planner: Planner | None = None
  task: Task = 'captions'
  editing: Callable[[np.ndarray], Subject] | None = None
  data: DataConfig | None = None

  @property
  def foreign(self) -> tuple[str, ...]:
    """A line where it learned from other pictures than those that it is asked for, else none."""
    if self.task == 'classes' or self.data is None or not self.data.is_stored:
      return ()
    return (
      f'it was trained on {self.data.source}, and is asked for what the embedded sets hold out, '
      'which it never saw',
    )


@dataclasses.dataclass(frozen=True)
class Options:
  """How much is evaluated.

  Attributes:
    captions: captions of each split; of a model that draws from classes, pictures.
    splits: held-out splits of the data.
    seed: of the captions and their distractors.
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
class Row:
  """A row of a sheet.

  Attributes:
    label: what stands to its left.
    images: uint8 [n, R, R, 3].
    said: what stands below each picture; empty where nothing does.
  """

  label: str
  images: np.ndarray
  said: tuple[str, ...] = ()

  @classmethod
  def first(cls, label: str, images: np.ndarray, said: Sequence[str] = ()) -> Row:
    """Of many pictures, the first: as many as a sheet shows."""
    return cls(label, images[:_SHOWN], tuple(said[:_SHOWN]))


Sheet = tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Report:
  """What a benchmark found: lines to print, a JSON-able protocol, and a sheet of each split."""

  lines: tuple[str, ...]
  protocol: Mapping[str, Any]
  sheets: Mapping[str, Sheet]


def protocol(
  name: str,
  question: str,
  subject: Subject,
  options: Options,
  results: Mapping[str, Any],
  **more: Any,
) -> dict[str, Any]:
  """What every report's JSON says of how it was measured, then `more`, then the results."""
  return {
    'benchmark': name,
    'question': question,
    **dataclasses.asdict(options),
    'image_size': subject.image_size,
    'subject': dict(subject.description),
    'notes': list(subject.foreign),
    **more,
    'results': dict(results),
  }


def distinct(source: Source, count: int) -> list[Record]:
  """The first records of a source whose captions differ.

  Raises:
    UserError: there are too few.
  """
  found: dict[str, Record] = {}
  for index in range(len(source)):
    record = source[index]
    found.setdefault(record.caption, record)
    if len(found) == count:
      return list(found.values())
  raise UserError(
    f'--captions={count}, and {len(source)} records of this split have {len(found)} different ones'
  )
