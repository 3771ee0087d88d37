"""Editing: is the edit done, and is everything else preserved?

The model edits source images of held-out edits of scenes, for which the target image and the mask
of all changes are known. Metrics:

  done: inside the mask, the result is nearer to the target than to the source, in mean squared
    difference. Noise as the result counts as done in about half of the edits.
  close: inside the mask, the distance to the target is less than half of that between source and
    target.
  PSNR inside: PSNR to the target inside the mask, the quality of the edit.
  PSNR outside: PSNR to the source outside the mask, the preservation of the rest.
  resembles target: an evaluator network that no generator used says that the whole image resembles
    the target more than the source.

A PSNR is that of one image of 8-bit levels, with peak 255, and is averaged over images, as in
PIE-Bench. An error below that of rounding to 8 bits (1/12 squared levels) counts as this error, so
an identical image has 58.9 dB. PIE-Bench divides the error by all pixels of the image, also those
inside the mask, which count as preserved; `psnr_outside_pie` in the report does so too.

Other rows:

  the source image: a copy.
  noise.
  the source, the target through the codec: encoded and decoded, without the model; the most that a
    model with this codec can preserve, and the closest that it can come to the target.
  generated for another edit: an image with the style of the model, but the wrong content.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vpe_jax.contracts import Edits
from vpe_jax.data.embedded import edits
from vpe_jax.data.records import Split, edit_mask, render
from vpe_jax.evaluation import intervals, report
from vpe_jax.evaluation.evaluator import Lowered, Subject
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.intervals import Figure
from vpe_jax.evaluation.report import (
  FROM_DRAFTS,
  GENERATED,
  HELD_OUT,
  MODEL_ROWS,
  Report,
  Row,
  check_options,
  differences,
  distinct_records,
  hash_items,
  model_figures,
  number,
  percent,
  protocol,
  summaries,
)

COPY, NOISE, OTHERS = 'the source image', 'noise', 'generated for another edit'
SOURCE_CODED, TARGET_CODED = 'the source through the codec', 'the target through the codec'
_LEAST_ERROR = 1 / 12  # squared 8-bit levels: the error of rounding
_CLOSE = 0.5  # of the distance between source and target
_POOL = 8  # edits composed per edit used (at least 256 in all), to find distinct instructions

_SHARES = ('done', 'close', 'resembles_target')
_NUMBERS = ('done', 'close', 'psnr_outside')  # figures of `Report.figures`
# Differences of rows of the same edits.
_PAIRS = ((FROM_DRAFTS, GENERATED), (GENERATED, OTHERS), (GENERATED, SOURCE_CODED))

Embed = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class HeldOutEdits:
  """Held-out edits.

  Attributes:
    source: images before the edit, uint8 [N, R, R, 3].
    target: images after the edit, uint8 [N, R, R, 3].
    mask: bool [N, R, R], true where source and target differ.
    instructions: N texts.
    kinds: str [N]: `add`, `remove`, `recolour`, `replace` or `move`.
  """

  source: np.ndarray
  target: np.ndarray
  mask: np.ndarray
  instructions: list[str]
  kinds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
  """Scores of one set of images; see the docstring of this file.

  Attributes:
    done: bool [N].
    close: bool [N].
    resembles_target: bool [N].
    psnr_inside: float [N], decibels.
    psnr_outside: float [N], decibels.
    psnr_outside_pie: float [N], decibels, over all pixels, of which those inside the mask count as
      preserved.
  """

  done: np.ndarray
  close: np.ndarray
  resembles_target: np.ndarray
  psnr_inside: np.ndarray
  psnr_outside: np.ndarray
  psnr_outside_pie: np.ndarray

  @functools.cached_property
  def figures(self) -> dict[str, Figure]:
    """The mean of each attribute."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {
      name: (intervals.share if name in _SHARES else intervals.mean)(array)
      for name, array in values.items()
    }

  def of_kind(self, is_kind: np.ndarray) -> Result:
    """The scores of some of the images, which a mask [N] selects."""
    return Result(*(getattr(self, field.name)[is_kind] for field in dataclasses.fields(self)))

  def summary(self, kinds: np.ndarray) -> dict[str, Any]:
    """Plain numbers for JSON, of all edits and of each kind."""
    by_kind = {str(kind): self.of_kind(kinds == kind) for kind in np.unique(kinds)}
    return {
      **summaries(self.figures),
      'kinds': {
        kind: {'edits': len(result.done), **summaries(result.figures)}
        for kind, result in by_kind.items()
      },
    }


@dataclasses.dataclass(frozen=True)
class EditBenchmark:
  """Held-out edits; see vpe_jax.evaluation.evaluator.Evaluator.

  Attributes:
    captions: number of instructions of each split.
    splits: held-out splits of the data.
    seed: seed of the edits.
    evaluator_network: weights of the evaluator network.
  """

  requires = (Edits,)
  tasks = ('edits',)
  folder = 'evaluation'

  captions: int = 512
  splits: tuple[str, ...] = HELD_OUT
  seed: int = 0
  evaluator_network: str = 'assets:evaluator_network'

  def check(self) -> None:
    """See Evaluator."""
    check_options(self.captions, self.splits, self.seed)

  def programs(self, subject: Subject) -> list[Lowered]:
    """See Evaluator."""
    return subject.sampling_programs()

  def run(self, subject: Subject) -> Report:
    """Scores the controls, and edits from the model's own drafts and from ground-truth drafts."""
    network = EvaluatorNetwork.load(self.evaluator_network)
    results, lines, sheets, figures, instructions = {}, [], {}, {}, []
    for split in self.splits:
      held_out = make_edits(self.captions, split, self.seed, subject.image_size)
      noise = np.random.default_rng(self.seed).integers(0, 256, held_out.source.shape, np.uint8)
      rows = {COPY: held_out.source, NOISE: noise, **_generated(subject, held_out)}
      outcomes = {name: measure(images, held_out, network.images) for name, images in rows.items()}
      lines += table(split, outcomes, held_out.kinds)
      by_row = {name: result.figures for name, result in outcomes.items()}
      figures |= model_figures(f'edits/{split}', by_row, _NUMBERS)
      results[split] = {
        'rows': {name: result.summary(held_out.kinds) for name, result in outcomes.items()},
        'differences': {
          name: summaries(pair) for name, pair in differences(by_row, _PAIRS).items()
        },
        'changed': float(held_out.mask.mean()),
        'edits': [
          {
            'instruction': instruction,
            'kind': str(kind),
            'done': bool(outcomes[GENERATED].done[i]),
            'psnr_outside': float(outcomes[GENERATED].psnr_outside[i]),
          }
          for i, (instruction, kind) in enumerate(zip(held_out.instructions, held_out.kinds))
        ],
      }
      instructions.append(held_out.instructions)
      sheets[split] = (
        Row.first('source', held_out.source, held_out.instructions),
        Row.first('target', held_out.target),
        *(Row.first(name, rows[name]) for name in MODEL_ROWS if name in rows),
      )
    details = {
      'source': 'vpe_jax.data.embedded.edits',
      'done': 'nearer to the target than to the source inside the mask, by squared error',
      'close': 'distance to the target less than half of that of the source, inside the mask',
      'resembles_target': 'vector of the evaluator network nearer to the target than to the source',
      'psnr': 'dB, 8-bit levels, peak 255, mean over images; outside: to the source, over pixels '
      'outside the mask (_pie: over all pixels); an error below 1/12 counts as 1/12',
      'differences': 'of rows of the same edits, which are resampled together',
      'evaluator_network_checkpoint': network.fingerprint,
    }
    question = 'is the edit done, and is everything else preserved?'
    record = protocol(self, 'edits', question, subject, results, **details)
    return Report(figures, tuple(lines), record, sheets, hash_items(*instructions))


def _generated(subject: Subject, held_out: HeldOutEdits) -> dict[str, np.ndarray]:
  """Row label -> images that the model or its codec generates."""
  rows = {
    SOURCE_CODED: subject.reconstruct(held_out.source),
    TARGET_CODED: subject.reconstruct(held_out.target),
  }
  model = subject.editing(held_out.source)
  rows[GENERATED] = model.sample(held_out.instructions)
  rows[OTHERS] = np.roll(rows[GENERATED], 1, axis=0)
  if subject.generator.system.drafts:
    rows[FROM_DRAFTS] = model.sample_from_drafts(held_out.instructions, held_out.target)
  return rows


def make_edits(count: int, split: Split, seed: int, size: int) -> HeldOutEdits:
  """Held-out edits with distinct instructions.

  Raises:
    UserError: the split has too few distinct instructions.
  """
  records = distinct_records(edits.Edits(max(_POOL * count, 256), split, seed), count)
  return HeldOutEdits(
    source=np.stack([record.reference.render(size) for record in records]),
    target=np.stack([render(record, size) for record in records]),
    mask=np.stack([edit_mask(record, size) for record in records]),
    instructions=[record.caption for record in records],
    kinds=np.asarray([record.edit.kind for record in records]),
  )


def measure(images: np.ndarray, held_out: HeldOutEdits, embed: Embed) -> Result:
  """Compares edited images [N, R, R, 3] uint8 with sources and targets.

  Args:
    images: edits of `held_out.source`.
    held_out: the edits.
    embed: maps images to unit vectors.
  """
  to_source, to_target = (_squared(images, other) for other in (held_out.source, held_out.target))
  inside = lambda error: np.sum(error * held_out.mask, axis=(1, 2))
  outside = np.sum(to_source * ~held_out.mask, axis=(1, 2))
  changed = held_out.mask.sum((1, 2))
  pixels = held_out.mask[0].size
  vectors, source, target = (embed(x) for x in (images, held_out.source, held_out.target))
  return Result(
    done=inside(to_target) < inside(to_source),
    close=inside(to_target) < _CLOSE**2 * inside(_squared(held_out.source, held_out.target)),
    resembles_target=np.sum(vectors * target, 1) > np.sum(vectors * source, 1),
    psnr_inside=psnr(inside(to_target) / changed),
    psnr_outside=psnr(outside / (pixels - changed)),
    psnr_outside_pie=psnr(outside / pixels),
  )


def table(split: str, outcomes: Mapping[str, Result], kinds: np.ndarray) -> list[str]:
  """The results of one split as aligned lines."""
  title = (
    f'split {split}: {len(kinds)} edits (95% intervals); done: nearer to the target than to the '
    'source inside the mask (about half by chance); close: distance to the target less than half '
    'of that of the source; PSNR in dB, mean over images: to the target inside the mask, to the '
    'source outside'
  )
  by_row = {name: result.figures for name, result in outcomes.items()}
  columns = {
    'done': ('done', percent),
    'close': ('close', percent),
    'PSNR inside': ('psnr_inside', number),
    'PSNR outside': ('psnr_outside', number),
    'resembles target': ('resembles_target', percent),
  }
  names = [name for name in MODEL_ROWS if name in outcomes]
  shares_by_kind = []
  for kind in np.unique(kinds):
    shares = [f'{outcomes[name].done[kinds == kind].mean():.0%}' for name in names]
    shares_by_kind.append(f'{kind} {" / ".join(shares)} of {np.sum(kinds == kind)}')
  by_kind = f'  done, by kind ({" / ".join(names)}): {", ".join(shares_by_kind)}'
  return [title, *report.table(columns, by_row, _PAIRS), by_kind]


def _squared(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Squared differences [N, R, R] of 8-bit levels, averaged over channels."""
  return np.square(images.astype(np.float32) - others.astype(np.float32)).mean(-1)


def psnr(error: np.ndarray) -> np.ndarray:
  """PSNR in decibels of mean squared errors of 8-bit levels."""
  return 10 * np.log10(255**2 / np.maximum(error, _LEAST_ERROR))
