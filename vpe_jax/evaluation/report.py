"""Reports of evaluators: numbers, tables, protocols and sheets of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vpe_jax import rng
from vpe_jax.config import did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.data.records import SPLITS, Record, Source

HELD_OUT = ('combination', 'concept')
FROM_DRAFTS = 'from ground-truth drafts'  # row label; see contracts.Samples.drafts
_COLUMNS = 8  # images in a row of a sheet


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a sheet.

  Attributes:
    label: text left of the row.
    images: uint8 [n, R, R, 3].
    captions: text below each image; empty for none.
  """

  label: str
  images: np.ndarray
  captions: tuple[str, ...] = ()

  @classmethod
  def first(cls, label: str, images: np.ndarray, captions: Sequence[str] = ()) -> Row:
    """A row of the first images, at most as many as a sheet has columns."""
    return cls(label, images[:_COLUMNS], tuple(captions[:_COLUMNS]))


Sheet = tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Report:
  """The outcome of one evaluation.

  Attributes:
    numbers: scalar metrics by full name.
    lines: lines of a table to print.
    protocol: JSON-serializable record of the measurement and its results; empty for none.
    sheets: split -> sheet of images; '' for a single sheet of all splits.
  """

  numbers: Mapping[str, float]
  lines: tuple[str, ...] = ()
  protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sheets: Mapping[str, Sheet] = dataclasses.field(default_factory=dict)


def protocol(
  evaluator: Any, name: str, question: str, subject: Any, results: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
  """The JSON of a report: options, subject, details of the measurement (`more`) and results."""
  return {
    'benchmark': name,
    'question': question,
    **dataclasses.asdict(evaluator),
    'image_size': subject.image_size,
    'subject': dict(subject.description),
    'notes': list(subject.notes),
    **more,
    'results': dict(results),
  }


def distinct_records(source: Source, count: int) -> list[Record]:
  """The first `count` records of a source with distinct captions.

  Raises:
    UserError: the source has too few distinct captions.
  """
  records: dict[str, Record] = {}
  for index in range(len(source)):
    record = source[index]
    records.setdefault(record.caption, record)
    if len(records) == count:
      return list(records.values())
  raise UserError(
    f'captions is {count}, but the {len(source)} records of this split have only {len(records)} '
    'distinct captions: ask for fewer'
  )


def check_options(
  count: int, splits: Sequence[str], seed: int, option: str = 'captions'
) -> None:
  """Checks the options that several evaluators share; `option` is the name of the count.

  Raises:
    UserError: too few captions, an unknown split, or a seed out of range.
  """
  rng.check_seed(seed)
  if not splits:
    raise UserError(f'splits is empty: name some of {", ".join(SPLITS)}')
  for split in splits:
    if split not in SPLITS:
      raise UserError(f"unknown split '{split}'{did_you_mean(split, SPLITS)}")
  if count < 2:
    raise UserError(f'{option} is {count}: at least 2 are needed')


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
  """Wilson score interval of a share of `count` observations; 95% by default."""
  centre = share + z * z / (2 * count)
  half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  scale = 1 + z * z / count
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
