"""Caption retrieval: does an image score highest with its own caption among 32?

An evaluator network that the generator never used (a SigLIP of another seed and patch size) embeds
images and captions. For each held-out caption there are 31 wrong ones: `HARD` that differ from it
in one object, colour or count, and captions of other images. Chance is 1 / 32.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vpe_jax.contracts import Samples
from vpe_jax.data.embedded import distractors, scenes
from vpe_jax.data.records import Record, Split, Truth, render
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import HELD_OUT, Report, Row, check_options, protocol

CANDIDATES = 32
HARD = 16
RELATIONS = 3  # the other ways in which two things can lie
_POOL = 4  # scenes drawn for each that is used: distinct captions, and more to choose from
TIE = 1e-6  # cosines closer than this count as equal
# The bars that `verdict` checks.
_TRUE_BAR = 0.6  # accuracy on the true images: is the evaluator network good enough?
_SHARE_BAR = 0.5  # of it, that generated images reach
_CHANCES_BAR = 3  # times chance, that images of a quickstart run reach


@dataclasses.dataclass(frozen=True)
class Trial:
  """One caption and what it is told apart from.

  Attributes:
    caption: the true caption, which a generator is also fields to rng.
    hard: (kind, caption) of distractors that differ in one detail; kind says which.
    others: captions of other pictures.
    relations: captions that differ in a spatial relation alone: reported apart, not among the 32.
  """

  caption: str
  hard: tuple[tuple[str, str], ...]
  others: tuple[str, ...]
  relations: tuple[str, ...] = ()

  @property
  def candidates(self) -> tuple[str, ...]:
    """The true caption first, then the hard distractors, then the others."""
    return (self.caption, *(caption for _, caption in self.hard), *self.others)

  @property
  def kinds(self) -> tuple[str, ...]:
    """The kind of each candidate: `true`, the kind of a hard distractor, or `other`."""
    return ('true', *(kind for kind, _ in self.hard), *('other' for _ in self.others))


@dataclasses.dataclass(frozen=True)
class Result:
  """How one set of pictures did.

  Attributes:
    credit: float [N], 1 where the true caption scores highest, 1 / m where it ties with m - 1
      others, else 0.
    hard: the same among the true caption and its hard distractors only.
    lost_to: kind of candidate -> share of the trials that it won.
    relation: share of the relation distractors that score below the true caption (None: there
      are none); a tie counts half.
    pictures: how many pictures stand behind it: what the interval goes by.
  """

  credit: np.ndarray
  hard: np.ndarray
  lost_to: Mapping[str, float]
  relation: float | None
  pictures: int

  @property
  def accuracy(self) -> float:
    """Share of pictures that retrieve their own caption."""
    return float(self.credit.mean())

  @property
  def interval(self) -> tuple[float, float]:
    """95 % Wilson interval of the accuracy."""
    return wilson(self.accuracy, self.pictures)

  def summary(self) -> dict[str, Any]:
    """Plain numbers, for a table or JSON."""
    return {
      'accuracy': self.accuracy,
      'interval95': list(self.interval),
      'pictures': self.pictures,
      'trials': len(self.credit),
      'accuracy_among_hard': float(self.hard.mean()),
      'lost_to': dict(self.lost_to),
      'relation_pairs_right': self.relation,
    }


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """Retrieval of held-out captions; see vpe_jax.evaluation.evaluator.Evaluator.

  Attributes:
    captions: captions of each split.
    splits: held-out splits of the data.
    seed: of the captions and their distractors.
    judge: weights of the evaluator network.
  """

  requires = (Samples,)
  tasks = ('captions',)
  folder = 'evaluation'

  captions: int = 512
  splits: tuple[str, ...] = HELD_OUT
  seed: int = 0
  judge: str = 'assets:judge'

  def check(self) -> None:
    """See Evaluator."""
    check_options(self.captions, self.splits, self.seed)

  def run(self, subject: Subject) -> Report:
    """Accuracies of true and generated images, and of both against permuted captions."""
    judge = EvaluatorNetwork.load(self.judge)
    results, lines, sheets, numbers = {}, [], {}, {}
    for split in self.splits:
      start = time.time()
      trials, records = make_trials(self.captions, split, self.seed)
      vectors_of = embed(judge.captions, trials)
      prompts = [trial.caption for trial in trials]
      true = np.stack([render(record, subject.image_size) for record in records])
      generated = subject.sample(prompts)
      outcomes = {}
      for row, images in {'true images': true, 'generated': generated}.items():
        vectors = judge.images(images)
        outcomes[row] = measure(vectors, vectors_of, trials)
        outcomes[f'{row}, captions permuted'] = permuted(vectors, vectors_of, trials)
      lines += table(split, outcomes)
      numbers[f'retrieval/{split}/accuracy'] = outcomes['generated'].accuracy
      results[split] = {
        'rows': {row: result.summary() for row, result in outcomes.items()},
        'generated_over_true': _ratio(outcomes),
        'bars': verdict(outcomes),
        'seconds': round(time.time() - start, 1),
        'captions': [
          {'caption': caption, 'true': float(a), 'generated': float(b)}
          for caption, a, b in zip(
            prompts, outcomes['true images'].credit, outcomes['generated'].credit
          )
        ],
      }
      sheets[split] = (Row.first('true', true, prompts), Row.first('generated', generated))
    question = 'does the image score highest with its own caption?'
    measured = {
      'candidates': CANDIDATES,
      'hard_distractors': HARD,
      'chance': 1 / CANDIDATES,
      'ties': f'credit is shared among captions whose cosines differ by at most {TIE}',
      'permuted': 'each image against trials of other images, up to 16 cyclic shifts',
      'relations': 'true caption against each other relation, in pairs, not among the candidates',
      'source': 'vpe_jax.data.embedded.scenes',
      'judge_checkpoint': judge.fingerprint,
    }
    record = protocol(self, 'retrieval', question, subject, results, **measured)
    return Report(numbers, tuple(lines), record, sheets)


def make_trials(count: int, split: Split, seed: int = 0) -> tuple[list[Trial], list[Record]]:
  """Draws `count` scenes of a split with different captions, and what each is told apart from.

  The hard distractors put the scene's own words together anew with one object, colour or count
  changed. An `other` is the caption of another scene of the same split which shows something
  else: a scene with the same things (whatever their places, sizes and ground), or with some of
  them, is passed over, as its caption would be true of the picture too. A scene with fewer than
  `HARD` near misses (some single shapes) takes no part.

  Returns:
    The trials, and their records with picture and truth, in the same order.
  """
  pool: dict[str, Record] = {}
  source = scenes.Scenes(max(_POOL * count, 256), split, seed)
  for record in source:
    pool.setdefault(record.caption, record)
  rng = random.Random(f'{split}-{seed}')
  trials, records = [], []
  for record in pool.values():
    if len(trials) == count:
      break
    trial = _trial(record, list(pool.values()), rng)
    if trial is not None:
      trials.append(trial)
      records.append(record)
  if len(trials) < count:
    raise ValueError(f'only {len(trials)} captions in {len(source)} scenes of {split}')
  return trials, records


def measure(
  images: np.ndarray, captions: Mapping[str, np.ndarray], trials: Sequence[Trial]
) -> Result:
  """Scores pictures against the candidates of their trials.

  Args:
    images: unit vectors [N, D], one for each trial.
    captions: unit vector [D] of every caption that occurs in the trials.
    trials: N trials; a shuffled list gives the permuted control.
  """
  if len(images) != len(trials):
    raise ValueError(f'{len(images)} pictures for {len(trials)} trials')
  credit, hard, lost, relation = [], [], {}, []
  for image, trial in zip(images, trials):
    scores = np.stack([captions[caption] for caption in trial.candidates]) @ image
    best = scores >= scores.max() - TIE
    credit.append(_share(best))
    among = scores[: 1 + len(trial.hard)]
    hard.append(_share(among >= among.max() - TIE))
    for kind, won in zip(trial.kinds, best / best.sum()):
      lost[kind] = lost.get(kind, 0.0) + float(won)
    for caption in trial.relations:
      margin = scores[0] - captions[caption] @ image
      relation.append(0.5 if abs(margin) <= TIE else float(margin > 0))
  lost.pop('true')
  return Result(
    credit=np.asarray(credit),
    hard=np.asarray(hard),
    lost_to={kind: count / len(trials) for kind, count in sorted(lost.items())},
    relation=float(np.mean(relation)) if relation else None,
    pictures=len(images),
  )


def permuted(
  images: np.ndarray,
  captions: Mapping[str, np.ndarray],
  trials: Sequence[Trial],
  rounds: int = 16,
) -> Result:
  """The control: every picture is scored against trials of other pictures.

  Shifts the trials cyclically by `rounds` different distances, which pairs no picture with its
  own caption. A judge that tells captions apart ends below 1 / 32: the true caption stands amid
  its near misses, and for a foreign picture one of them or an `other` nearly always fits better.
  The interval goes by the number of pictures, as if there were one round.
  """
  rounds = min(rounds, len(trials) - 1)
  distances = [1 + i * (len(trials) - 1) // rounds for i in range(rounds)]
  shifted = [[*trials[d:], *trials[:d]] for d in distances]
  result = measure(np.tile(images, (rounds, 1)), captions, [t for s in shifted for t in s])
  return dataclasses.replace(result, pictures=len(images))


def embed(
  judge: Callable[[list[str]], np.ndarray], trials: Sequence[Trial]
) -> dict[str, np.ndarray]:
  """The unit vector of every caption in the trials, each embedded once."""
  texts = sorted({c for trial in trials for c in (*trial.candidates, *trial.relations)})
  return dict(zip(texts, judge(texts)))


def table(split: str, outcomes: Mapping[str, Result]) -> list[str]:
  """The results of one split as aligned lines."""
  chance, among = 1 / CANDIDATES, 1 / (1 + HARD)
  lines = [
    f'split {split}: own caption first among {CANDIDATES} '
    f'(chance {chance:.1%}), among it and the {HARD} hard ones (chance {among:.1%}), '
    'and before one with another relation (chance 50%)',
    f'  {"images":32}{"among 32":>10}{"95% interval":>18}{"hard only":>12}{"relation":>11}',
  ]
  for row, result in outcomes.items():
    low, high = result.interval
    relation = '-' if result.relation is None else f'{result.relation:.1%}'
    lines.append(
      f'  {row:32}{result.accuracy:>10.1%}{f"{low:.1%} to {high:.1%}":>18}'
      f'{result.hard.mean():>12.1%}{relation:>11}'
    )
  if outcomes['true images'].interval[0] <= chance:
    return [
      *lines,
      '  the evaluator network finds true images no better than chance: this split says nothing '
      'about generated ones',
    ]
  lines.append(f'  generated images reach {_ratio(outcomes):.0%} of what the true images reach')
  words = {True: 'reached', False: 'not reached'}
  return lines + [f'  bar: {bar}: {words[passed]}' for bar, passed in verdict(outcomes).items()]


def verdict(outcomes: Mapping[str, Result]) -> dict[str, bool]:
  """Each bar of the protocol in words, and whether the results of one split reach it."""
  chance = 1 / CANDIDATES
  true, generated = outcomes['true images'].accuracy, outcomes['generated'].accuracy
  permuted = [result.accuracy for row, result in outcomes.items() if row.endswith('permuted')]
  return {
    f'true images at least {_TRUE_BAR:.0%}': true >= _TRUE_BAR,
    f'generated at least {_SHARE_BAR:.0%} of true images': generated >= _SHARE_BAR * true > 0,
    f'generated at least {_CHANCES_BAR} x chance ({_CHANCES_BAR * chance:.1%}), as of a quickstart '
    'run': generated >= _CHANCES_BAR * chance,
    f'permuted at most chance ({chance:.1%})': max(permuted, default=0.0) <= chance,
  }


def _ratio(outcomes: Mapping[str, Result]) -> float | None:
  """Accuracy of the generated images over that of the true ones; None where that is 0."""
  true = outcomes['true images'].accuracy
  return outcomes['generated'].accuracy / true if true else None


def _trial(record: Record, pool: Sequence[Record], rng: random.Random) -> Trial | None:
  """A record's trial; None if there aren't enough wrong captions."""
  seed = rng.randrange(2**31)
  hard = distractors.distractors(record, HARD, seed)
  relations = distractors.relation_distractors(record, RELATIONS, seed)
  taken = {record.caption, *(caption for _, caption in hard)}
  others: list[str] = []
  for other in rng.sample(pool, len(pool)):
    if len(others) == CANDIDATES - 1 - HARD:
      break
    if other.caption not in taken and not _covers(record.truth, other.truth):
      taken.add(other.caption)
      others.append(other.caption)
  if len(taken) < CANDIDATES:
    return None
  return Trial(record.caption, tuple(hard), tuple(others), tuple(c for _, c in relations))


def _covers(truth: Truth, other: Truth) -> bool:
  """Whether everything that `other` shows is in `truth` too, as often or more often."""
  return all(_things(truth)[thing] >= n for thing, n in _things(other).items())


def _things(truth: Truth) -> collections.Counter[tuple[str, str | None]]:
  counts: collections.Counter[tuple[str, str | None]] = collections.Counter()
  for cluster in truth.clusters:
    counts[cluster.name, cluster.colour] += cluster.count
  return counts


def _share(best: np.ndarray) -> float:
  """The credit of the true caption, the first candidate, where `best` [C] marks the highest."""
  return float(best[0]) / float(best.sum())
