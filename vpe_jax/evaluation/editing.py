"""Editing: is the edit done, and is everything else unchanged?

A model is given the source image and the instruction of held-out edits of scenes, whose target
image is known, and so is the mask of everything that changes. An edit is done if inside the mask
the image is nearer to the target than to the source, in mean squared difference, and close if it is
less than half as far from the target as the source is. About half of all edits are done by chance,
as `noise` shows. PSNR to the target inside the mask measures how close it comes, PSNR to the source
outside the mask how well the rest is preserved. An evaluator network that no generator saw says
which of the two images it resembles more as a whole. `the source image` is the score of a copy;
images that were generated for other edits have the model's style and nothing else.
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
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import HELD_OUT, Report, Row, check_options, distinct, protocol
from vpe_jax.evaluation.retrieval import wilson

COPY, NOISE, OTHERS = 'the source image', 'noise', 'generated for another edit'
FROM_TRUE = 'generated from true drafts'
_CLOSE = 0.5  # of the distance between source and target
_POOL = 8  # edits composed for each that is used: enough with different instructions

_SHARES = ('done', 'close', 'like_after')

Embed = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class HeldOutEdits:
  """Held-out edits.

  Attributes:
    source: images before the edit, uint8 [N, R, R, 3].
    target: images after it.
    mask: bool [N, R, R], where the two differ.
    instructions: N texts.
    kinds: `add`, `remove`, `recolour`, `replace` or `move`.
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
    done: bool [N], nearer to the target than to the source, inside the mask.
    close: bool [N], less than half as far from the target as the source is, inside the mask.
    like_after: bool [N], the evaluator's vector is nearer to the target's than to the source's.
    error_inside: mean squared difference to the target inside the masks, in levels squared, over
      all pixels of all images.
    error_outside: to the source, outside the masks.
  """

  done: np.ndarray
  close: np.ndarray
  like_after: np.ndarray
  error_inside: float
  error_outside: float

  def summary(self, kinds: np.ndarray) -> dict[str, Any]:
    """Plain numbers, for a table or JSON; a PSNR without error is None."""
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
    captions: instructions of each split.
    splits: held-out splits of the data.
    seed: of the edits.
    judge: weights of the evaluator network.
  """

  requires = (Edits,)
  tasks = ('edits',)
  folder = 'evaluation'

  captions: int = 512
  splits: tuple[str, ...] = HELD_OUT
  seed: int = 0
  judge: str = 'assets:judge'

  def check(self) -> None:
    """See Evaluator."""
    check_options(self.captions, self.splits, self.seed)

  def run(self, subject: Subject) -> Report:
    """Edits by the model, from its own drafts and from those of the target images."""
    judge = EvaluatorNetwork.load(self.judge)
    results, lines, sheets, numbers = {}, [], {}, {}
    for split in self.splits:
      held_out = make_edits(self.captions, split, self.seed, subject.image_size)
      noise = np.random.default_rng(self.seed).integers(0, 256, held_out.source.shape, np.uint8)
      rows = {COPY: held_out.source, NOISE: noise, **_generated(subject, held_out)}
      outcomes = {name: measure(images, held_out, judge.images) for name, images in rows.items()}
      lines += table(split, outcomes, held_out.kinds)
      for name in ('done', 'close'):
        numbers[f'edits/{split}/{name}'] = float(getattr(outcomes['generated'], name).mean())
      results[split] = {
        'rows': {name: result.summary(held_out.kinds) for name, result in outcomes.items()},
        'changed': float(held_out.mask.mean()),
        'edits': [
          {'told': instruction, 'kind': str(kind), 'done': bool(done)}
          for instruction, kind, done in zip(
            held_out.instructions, held_out.kinds, outcomes['generated'].done
          )
        ],
      }
      sheets[split] = (
        Row.first('source', held_out.source, held_out.instructions),
        Row.first('target', held_out.target),
        *(Row.first(name, rows[name]) for name in _own(rows)),
      )
    measured = {
      'source': 'vpe_jax.data.embedded.edits',
      'done': 'nearer to the target than to the source inside the mask, by squared error',
      'close': 'less than half as far from the target as the source is, inside the mask',
      'like_after': "the evaluator's vector is nearer to the target's than to the source's",
      'psnr': 'of the squared error over all pixels of all images inside, or outside, the masks',
      'judge_checkpoint': judge.fingerprint,
    }
    question = 'is the edit done, and is everything else unchanged?'
    record = protocol(self, 'edits', question, subject, results, **measured)
    return Report(numbers, tuple(lines), record, sheets)


def _generated(subject: Subject, fields: HeldOutEdits) -> dict[str, np.ndarray]:
  """Images of the model, by row."""
  model = subject.editing(fields.source)
  rows = {'generated': model.sample(fields.instructions)}
  rows[OTHERS] = np.roll(rows['generated'], 1, axis=0)
  if subject.generator.system.drafts:
    rows[FROM_TRUE] = model.sample_from_true_drafts(fields.instructions, fields.target)
  return rows


def make_edits(count: int, split: Split, seed: int, size: int) -> HeldOutEdits:
  """Edits of a split with different instructions.

  Raises:
    UserError: there are too few.
  """
  records = distinct(edits.Edits(max(_POOL * count, 256), split, seed), count)
  return HeldOutEdits(
    source=np.stack([record.reference.render(size) for record in records]),
    target=np.stack([render(record, size) for record in records]),
    mask=np.stack([edit_mask(record, size) for record in records]),
    instructions=[record.caption for record in records],
    kinds=np.asarray([record.edit.kind for record in records]),
  )


def measure(images: np.ndarray, fields: HeldOutEdits, embed: Embed) -> Result:
  """Compares edited images [N, R, R, 3] uint8 with sources and targets.

  Args:
    images: edits of `fields.source`.
    fields: the edits.
    embed: images -> unit vectors.
  """
  to_before, to_after = (_squared(images, other) for other in (fields.source, fields.target))
  inside = lambda error: np.sum(error * fields.mask, axis=(1, 2))
  vectors, before, after = (embed(x) for x in (images, fields.source, fields.target))
  return Result(
    done=inside(to_after) < inside(to_before),
    close=inside(to_after) < _CLOSE**2 * inside(_squared(fields.source, fields.target)),
    like_after=np.sum(vectors * after, 1) > np.sum(vectors * before, 1),
    error_inside=float(to_after[fields.mask].mean()),
    error_outside=float(to_before[~fields.mask].mean()),
  )


def table(split: str, outcomes: Mapping[str, Result], kinds: np.ndarray) -> list[str]:
  """The results of one split as aligned lines."""
  lines = [
    f'split {split}: {len(kinds)} edits; done: inside what changes, nearer to the target '
    'than to the source (half of them by chance); close: less than half as far from it as the '
    'source is; PSNR to the target inside, to the source outside',
    f'  {"images":28}{"done":>8}{"95% interval":>18}{"close":>8}{"PSNR inside":>13}{"outside":>9}'
    f'{"judged like target":>19}',
  ]
  for name, result in outcomes.items():
    low, high = wilson(float(result.done.mean()), len(result.done))
    lines.append(
      f'  {name:28}{result.done.mean():>8.1%}{f"{low:.1%} to {high:.1%}":>18}'
      f'{result.close.mean():>8.1%}{_psnr(result.error_inside):>13.2f}'
      f'{_psnr(result.error_outside):>9.2f}{result.like_after.mean():>19.1%}'
    )
  said = []
  for kind in np.unique(kinds):
    shares = [f'{outcomes[name].done[kinds == kind].mean():.0%}' for name in _own(outcomes)]
    said.append(f'{kind} {" / ".join(shares)} of {np.sum(kinds == kind)}')
  return [*lines, f'  done, by kind ({" / ".join(_own(outcomes))}): {", ".join(said)}']


def _own(rows: Mapping[str, Any]) -> list[str]:
  """The rows of images that the model generated for the edit."""
  return [name for name in rows if name not in (COPY, NOISE, OTHERS)]


def _shares(result: Result) -> dict[str, Any]:
  """Shares of a result, with intervals."""
  count, outcomes = len(result.done), {'edits': len(result.done)}
  for name in _SHARES:
    share = float(getattr(result, name).mean())
    outcomes[name] = {'share': share, 'interval95': list(wilson(share, count))}
  return outcomes


def _squared(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Squared differences [N, R, R] of levels, means over the channels."""
  return np.square(images.astype(np.float32) - others.astype(np.float32)).mean(-1)


def _psnr(error: float) -> float:
  """In decibels; infinite where there is no error."""
  return 20 * math.log10(255) - 10 * math.log10(error) if error else math.inf
