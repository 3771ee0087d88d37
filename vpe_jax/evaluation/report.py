"""Reports of evaluators: numbers, tables, protocols and sheets of images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vpe_jax import rng
from vpe_jax.config import did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.data.records import SPLITS, Record, Source
from vpe_jax.evaluation import intervals
from vpe_jax.evaluation.intervals import Figure

HELD_OUT = ('combination', 'concept')
# Row labels; for drafts and codecs, see contracts.Samples.
GROUND_TRUTH, GENERATED = 'ground truth', 'generated'
FROM_DRAFTS = 'from ground-truth drafts'
RECONSTRUCTED = 'ground truth through the codec'
TRUE_DRAFTS = 'true_drafts'  # in the names of figures
BOUNDS = '/low95', '/high95'  # end the names of the bounds of a logged number
# Row of images by the model -> part of the names of its figures.
MODEL_ROWS = {GENERATED: '', FROM_DRAFTS: f'{TRUE_DRAFTS}/'}
# Differences that tell planner, renderer and codec apart.
PARTS = ((FROM_DRAFTS, GENERATED), (RECONSTRUCTED, FROM_DRAFTS), (GROUND_TRUTH, RECONSTRUCTED))
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
    figures: scalar metrics by full name. Those of images from ground-truth drafts have
      `/true_drafts/` in their names.
    lines: lines of a table to print.
    protocol: JSON-serializable record of the measurement and its results; empty for none.
    sheets: split -> sheet of images; '' for a single sheet of all splits.
    items: hash of the prompts; figures of reports with equal `items` are paired.
  """

  figures: Mapping[str, Figure]
  lines: tuple[str, ...] = ()
  protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sheets: Mapping[str, Sheet] = dataclasses.field(default_factory=dict)
  items: str = ''

  @property
  def numbers(self) -> dict[str, float]:
    """Values of the figures by name."""
    return {name: figure.value for name, figure in self.figures.items()}

  @property
  def bounds(self) -> dict[str, float]:
    """Bounds of the figures' intervals, by name with an ending of BOUNDS."""
    return {
      f'{name}{ending}': bound
      for name, figure in self.figures.items()
      for ending, bound in zip(BOUNDS, figure.interval or ())
    }


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
    'intervals': intervals.METHOD,
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


def check_options(count: int, splits: Sequence[str], seed: int, option: str = 'captions') -> None:
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


def model_figures(
  prefix: str, rows: Mapping[str, Mapping[str, Figure]], names: Sequence[str]
) -> dict[str, Figure]:
  """Figures `names` of the rows of the model, for `Report.figures`.

  Args:
    prefix: start of the names, such as `edits/combination`.
    rows: row label -> name -> figure.
    names: names of the figures to choose.
  """
  return {
    f'{prefix}/{part}{name}': rows[row][name]
    for row, part in MODEL_ROWS.items()
    if row in rows
    for name in names
  }


def differences(
  rows: Mapping[str, Mapping[str, Figure]], pairs: Sequence[tuple[str, str]] = PARTS
) -> dict[str, dict[str, Figure]]:
  """Paired differences of rows of the same images: `A minus B` -> name -> figure.

  Args:
    rows: row label -> name -> figure.
    pairs: labels (A, B); pairs with a label that `rows` lacks are left out.
  """
  return {
    f'{ours} minus {theirs}': {name: rows[ours][name] - rows[theirs][name] for name in rows[ours]}
    for ours, theirs in pairs
    if ours in rows and theirs in rows
  }


def summaries(figures: Mapping[str, Figure]) -> dict[str, Any]:
  """Plain numbers of figures, for JSON."""
  return {name: figure.summary() for name, figure in figures.items()}


def hash_items(*prompts: Sequence[str]) -> str:
  """Hash of lists of prompts, for `Report.items`."""
  return hashlib.sha256(json.dumps([list(texts) for texts in prompts]).encode()).hexdigest()[:12]


def percent(figure: Figure) -> str:
  """A share and its interval, in percent; differences have a sign."""
  return _with_interval(figure, 1, 100, '%')


def number(figure: Figure, places: int = 2, scale: float = 1) -> str:
  """A number and its interval, times `scale`; differences have a sign."""
  return _with_interval(figure, places, scale)


def _with_interval(figure: Figure, places: int, scale: float, unit: str = '') -> str:
  text = lambda value: f'{scale * value:{"+" if figure.is_difference else ""}.{places}f}'
  if figure.interval is None:
    return text(figure.value) + unit
  low, high = figure.interval
  return f'{text(figure.value)}{unit} ({text(low)} to {text(high)})'


def table(
  columns: Mapping[str, tuple[str, Callable[[Figure], str]]],
  rows: Mapping[str, Mapping[str, Figure]],
  pairs: Sequence[tuple[str, str]] = PARTS,
) -> list[str]:
  """Aligned lines of rows of figures, and of the paired differences of rows.

  Args:
    columns: header -> (name of a figure, function that formats it).
    rows: row label -> name -> figure; a row may lack figures.
    pairs: see `differences`.
  """

  lines = [['images', *columns]]
  for label, figures in {**rows, **differences(rows, pairs)}.items():
    cells = (text(figures[name]) if name in figures else '-' for name, text in columns.values())
    lines.append([label, *cells])
  return aligned(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table: the first column is aligned left, the others right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(['', cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))])
    for cells in rows
  ]
