"""Is an edit done, and is all else left as it was?

A model is given the picture before and the instruction of held-out edits of scenes, of which the
picture after is known, and so is the mask of all that changes. An edit counts as done if inside the
mask the picture is nearer to the one after than to the one before, in mean squared difference, and
as close if it is less than half as far from the one after as the one before is: that a picture is
nearer happens by chance, to every second one, and `noise` shows it. How near it comes is its PSNR
to the picture after inside the mask; what it does to all else, its PSNR to the picture before
outside. A judge that no generator saw says which of the two pictures it is more like as a whole.
`the picture before` is what a copy scores; pictures that were generated for other edits have the
model's style and no more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vpe_jax.data.embedded import edits
from vpe_jax.data.records import Split, changed, render
from vpe_jax.evaluation.judge import Judge
from vpe_jax.evaluation.report import Options, Report, Row, Subject, distinct, protocol
from vpe_jax.evaluation.retrieval import wilson

COPY, NOISE, OTHERS = 'the picture before', 'noise', 'generated for another edit'
_CLOSE = 0.5  # of the distance between the pictures before and after
_POOL = 8  # edits drawn for each that is used: enough with different instructions

_SHARES = ('done', 'close', 'like_after')  # what is told of each edit

Embed = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Asked:
  """Edits to be done.

  Attributes:
    before: uint8 [N, R, R, 3].
    after: the same.
    mask: bool [N, R, R], where they differ.
    told: N instructions.
    kinds: what each does: `add`, `remove`, `recolour`, `replace` or `move` a thing.
  """

  before: np.ndarray
  after: np.ndarray
  mask: np.ndarray
  told: list[str]
  kinds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
  """How one set of pictures did.

  Attributes:
    done: bool [N], nearer to the picture after than to the one before, inside the mask.
    close: bool [N], less than half as far from the picture after as the one before is, there.
    like_after: bool [N], the same of the judge's vectors of the whole pictures.
    error_inside: mean squared difference to the picture after inside the masks, in levels squared,
      over all pixels of all pictures.
    error_outside: to the picture before, outside.
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


def edits_report(subject: Subject, options: Options) -> Report:
  """Held-out edits, with the model's own plans and with those of the pictures after."""
  judge = Judge.load(options.judge)
  results, lines, sheets = {}, [], {}
  for split in options.splits:
    asked = make_edits(options.captions, split, options.seed, subject.image_size)
    noise = np.random.default_rng(options.seed).integers(0, 256, asked.before.shape, np.uint8)
    rows = {COPY: asked.before, NOISE: noise, **_drawn(subject, asked)}
    found = {name: measure(images, asked, judge.images) for name, images in rows.items()}
    lines += table(split, found, asked.kinds)
    results[split] = {
      'rows': {name: result.summary(asked.kinds) for name, result in found.items()},
      'changed': float(asked.mask.mean()),
      'edits': [
        {'told': told, 'kind': str(kind), 'done': bool(done)}
        for told, kind, done in zip(asked.told, asked.kinds, found['generated'].done)
      ],
    }
    sheets[split] = (
      Row.first('before', asked.before, asked.told),
      Row.first('target', asked.after),
      *(Row.first(name, rows[name]) for name in _own(rows)),
    )
  said = {
    'source': 'vpe_jax.data.embedded.edits',
    'done': 'nearer to the picture after than to the one before inside the mask, by squared error',
    'close': 'less than half as far from the picture after as the one before is, inside the mask',
    'like_after': "the judge's vector is nearer to the picture after's than to the one before's",
    'psnr': 'of the squared error over all pixels of all pictures inside, or outside, the masks',
    'judge_checkpoint': judge.fingerprint,
  }
  question = 'is the edit done, and is all else left as it was?'
  return Report(
    tuple(lines), protocol('edits', question, subject, options, results, **said), sheets
  )


def _drawn(subject: Subject, asked: Asked) -> dict[str, np.ndarray]:
  """Pictures of the model, in rows."""
  model = subject.editing(asked.before)
  rows = {'generated': model.draw(asked.told)}
  rows[OTHERS] = np.roll(rows['generated'], 1, axis=0)
  if model.planner is not None:
    plans = model.planner.read(asked.after, asked.told)
    rows['generated on the true plan'] = model.planner.render(plans)
  return rows


def make_edits(count: int, split: Split, seed: int, size: int) -> Asked:
  """Edits of a split with different instructions.

  Raises:
    UserError: there are too few.
  """
  records = distinct(edits.Edits(max(_POOL * count, 256), split, seed), count)
  return Asked(
    before=np.stack([record.reference.draw(size) for record in records]),
    after=np.stack([render(record, size) for record in records]),
    mask=np.stack([changed(record, size) for record in records]),
    told=[record.caption for record in records],
    kinds=np.asarray([record.edit.kind for record in records]),
  )


def measure(images: np.ndarray, asked: Asked, embed: Embed) -> Result:
  """Compares pictures [N, R, R, 3] uint8 with those before and after.

  Args:
    images: what was made of `asked.before`.
    asked: the edits.
    embed: pictures -> unit vectors.
  """
  to_before, to_after = (_squared(images, other) for other in (asked.before, asked.after))
  inside = lambda error: np.sum(error * asked.mask, axis=(1, 2))
  vectors, before, after = (embed(x) for x in (images, asked.before, asked.after))
  return Result(
    done=inside(to_after) < inside(to_before),
    close=inside(to_after) < _CLOSE**2 * inside(_squared(asked.before, asked.after)),
    like_after=np.sum(vectors * after, 1) > np.sum(vectors * before, 1),
    error_inside=float(to_after[asked.mask].mean()),
    error_outside=float(to_before[~asked.mask].mean()),
  )


def table(split: str, found: Mapping[str, Result], kinds: np.ndarray) -> list[str]:
  """The results of one split as aligned lines."""
  lines = [
    f'split {split}: {len(kinds)} edits; done: inside what changes, nearer to the picture after '
    'than to the one before (half of them by chance); close: less than half as far from it as the '
    'one before is; PSNR to the picture after inside, to the one before outside',
    f'  {"pictures":28}{"done":>8}{"95% interval":>18}{"close":>8}{"PSNR inside":>13}{"outside":>9}'
    f'{"judged like after":>19}',
  ]
  for name, result in found.items():
    low, high = wilson(float(result.done.mean()), len(result.done))
    lines.append(
      f'  {name:28}{result.done.mean():>8.1%}{f"{low:.1%} to {high:.1%}":>18}'
      f'{result.close.mean():>8.1%}{_psnr(result.error_inside):>13.2f}'
      f'{_psnr(result.error_outside):>9.2f}{result.like_after.mean():>19.1%}'
    )
  said = []
  for kind in np.unique(kinds):
    shares = [f'{found[name].done[kinds == kind].mean():.0%}' for name in _own(found)]
    said.append(f'{kind} {" / ".join(shares)} of {np.sum(kinds == kind)}')
  return [*lines, f'  done, by kind ({" / ".join(_own(found))}): {", ".join(said)}']


def _own(rows: Mapping[str, Any]) -> list[str]:
  """The rows of what the model made of an edit."""
  return [name for name in rows if name not in (COPY, NOISE, OTHERS)]


def _shares(result: Result) -> dict[str, Any]:
  """What a result counts, with intervals."""
  count, found = len(result.done), {'edits': len(result.done)}
  for name in _SHARES:
    share = float(getattr(result, name).mean())
    found[name] = {'share': share, 'interval95': list(wilson(share, count))}
  return found


def _squared(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Squared differences [N, R, R] of levels, means over the channels."""
  return np.square(images.astype(np.float32) - others.astype(np.float32)).mean(-1)


def _psnr(error: float) -> float:
  """In decibels; infinite where there is no error."""
  return 20 * math.log10(255) - 10 * math.log10(error) if error else math.inf
