"""Editing: is the edit done, and is everything else unchanged?

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

The rows `the source image` (a copy), `noise`, and `generated for another edit` (an image with the
style of the model, but the wrong content) are controls.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vpe_jax.contracts import Edits
from vpe_jax.data.embedded import edits
from vpe_jax.data.records import Split, edit_mask, render
from vpe_jax.evaluation.evaluator import Lowered, Subject
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import (
  FROM_DRAFTS,
  HELD_OUT,
  Report,
  Row,
  check_options,
  distinct_records,
  protocol,
  wilson_interval,
)

COPY, NOISE, OTHERS = 'the source image', 'noise', 'generated for another edit'
_CLOSE = 0.5  # of the distance between source and target
_POOL = 8  # edits composed per edit used (at least 256 in all), to find distinct instructions

_SHARES = ('done', 'close', 'resembles_target')

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
  """Scores of one set of images.

  Attributes:
    done: bool [N], see the docstring of this file.
    close: bool [N], likewise.
    resembles_target: bool [N], likewise.
    error_inside: mean squared difference to the target over all pixels inside the masks, in squared
      8-bit levels.
    error_outside: the same to the source, outside the masks.
  """

  done: np.ndarray
  close: np.ndarray
  resembles_target: np.ndarray
  error_inside: float
  error_outside: float

  def summary(self, kinds: np.ndarray) -> dict[str, Any]:
    """Plain numbers for a table or JSON; an infinite PSNR is None."""
    psnr = lambda error: _psnr(error) if error else None
    return {
      **_shares(self),
      'error_inside': self.error_inside,
      'psnr_inside': psnr(self.error_inside),
      'error_outside': self.error_outside,
      'psnr_outside': psnr(self.error_outside),
      'kinds': {
        str(kind): _shares(
          dataclasses.replace(
            self, **{name: getattr(self, name)[kinds == kind] for name in _SHARES}
          )
        )
        for kind in np.unique(kinds)
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
    results, lines, sheets, numbers = {}, [], {}, {}
    for split in self.splits:
      held_out = make_edits(self.captions, split, self.seed, subject.image_size)
      noise = np.random.default_rng(self.seed).integers(0, 256, held_out.source.shape, np.uint8)
      rows = {COPY: held_out.source, NOISE: noise, **_generated(subject, held_out)}
      outcomes = {name: measure(images, held_out, network.images) for name, images in rows.items()}
      lines += table(split, outcomes, held_out.kinds)
      for name in ('done', 'close'):
        numbers[f'edits/{split}/{name}'] = float(getattr(outcomes['generated'], name).mean())
      results[split] = {
        'rows': {name: result.summary(held_out.kinds) for name, result in outcomes.items()},
        'changed': float(held_out.mask.mean()),
        'edits': [
          {'instruction': instruction, 'kind': str(kind), 'done': bool(done)}
          for instruction, kind, done in zip(
            held_out.instructions, held_out.kinds, outcomes['generated'].done
          )
        ],
      }
      sheets[split] = (
        Row.first('source', held_out.source, held_out.instructions),
        Row.first('target', held_out.target),
        *(Row.first(name, rows[name]) for name in _generated_rows(rows)),
      )
    details = {
      'source': 'vpe_jax.data.embedded.edits',
      'done': 'nearer to the target than to the source inside the mask, by squared error',
      'close': 'distance to the target less than half of that of the source, inside the mask',
      'resembles_target': 'vector of the evaluator network nearer to the target than to the source',
      'psnr': 'of the mean squared error over all pixels inside, or outside, the masks',
      'evaluator_network_checkpoint': network.fingerprint,
    }
    question = 'is the edit done, and is everything else unchanged?'
    record = protocol(self, 'edits', question, subject, results, **details)
    return Report(numbers, tuple(lines), record, sheets)


def _generated(subject: Subject, held_out: HeldOutEdits) -> dict[str, np.ndarray]:
  """Row label -> images that the model generates."""
  model = subject.editing(held_out.source)
  rows = {'generated': model.sample(held_out.instructions)}
  rows[OTHERS] = np.roll(rows['generated'], 1, axis=0)
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
  vectors, source, target = (embed(x) for x in (images, held_out.source, held_out.target))
  return Result(
    done=inside(to_target) < inside(to_source),
    close=inside(to_target) < _CLOSE**2 * inside(_squared(held_out.source, held_out.target)),
    resembles_target=np.sum(vectors * target, 1) > np.sum(vectors * source, 1),
    error_inside=float(to_target[held_out.mask].mean()),
    error_outside=float(to_source[~held_out.mask].mean()),
  )


def table(split: str, outcomes: Mapping[str, Result], kinds: np.ndarray) -> list[str]:
  """The results of one split as aligned lines."""
  lines = [
    f'split {split}: {len(kinds)} edits; done: nearer to the target than to the source inside the '
    'mask (about half by chance); close: distance to the target less than half of that of the '
    'source; PSNR to the target inside the mask, to the source outside',
    f'  {"images":28}{"done":>8}{"95% interval":>18}{"close":>8}{"PSNR inside":>13}{"outside":>9}'
    f'{"resembles target":>19}',
  ]
  for name, result in outcomes.items():
    low, high = wilson_interval(float(result.done.mean()), len(result.done))
    lines.append(
      f'  {name:28}{result.done.mean():>8.1%}{f"{low:.1%} to {high:.1%}":>18}'
      f'{result.close.mean():>8.1%}{_psnr(result.error_inside):>13.2f}'
      f'{_psnr(result.error_outside):>9.2f}{result.resembles_target.mean():>19.1%}'
    )
  shares_by_kind = []
  for kind in np.unique(kinds):
    shares = [
      f'{outcomes[name].done[kinds == kind].mean():.0%}' for name in _generated_rows(outcomes)
    ]
    shares_by_kind.append(f'{kind} {" / ".join(shares)} of {np.sum(kinds == kind)}')
  rows = ' / '.join(_generated_rows(outcomes))
  return [*lines, f'  done, by kind ({rows}): {", ".join(shares_by_kind)}']


def _generated_rows(rows: Mapping[str, Any]) -> list[str]:
  """Labels of the rows that the model generated for the edits."""
  return [name for name in rows if name not in (COPY, NOISE, OTHERS)]


def _shares(result: Result) -> dict[str, Any]:
  """Shares of a result, with confidence intervals."""
  count, outcomes = len(result.done), {'edits': len(result.done)}
  for name in _SHARES:
    share = float(getattr(result, name).mean())
    outcomes[name] = {'share': share, 'interval95': list(wilson_interval(share, count))}
  return outcomes


def _squared(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Squared differences [N, R, R] of 8-bit levels, averaged over channels."""
  return np.square(images.astype(np.float32) - others.astype(np.float32)).mean(-1)


def _psnr(error: float) -> float:
  """PSNR in decibels; infinite if the error is 0."""
  return 20 * math.log10(255) - 10 * math.log10(error) if error else math.inf
