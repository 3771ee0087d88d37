"""Caption retrieval: does an image score highest with its own caption among 32?

An evaluator network that no generator used (a SigLIP with its own seed and patch size) embeds
images and captions. Each held-out caption competes with 31 wrong ones: `HARD` distractors that
differ in one object, colour or count, and captions of other images. Chance is 1 / 32.

Rows of ground-truth images through the image codec alone, and of images rendered from their drafts
(where the model has drafts), tell codec, renderer and planner apart.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vpe_jax.contracts import Samples, UserError
from vpe_jax.data.embedded import distractors, scenes
from vpe_jax.data.records import Record, Split, Truth, render
from vpe_jax.evaluation import intervals, report
from vpe_jax.evaluation.evaluator import Lowered, Subject, rows_of
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.intervals import Figure
from vpe_jax.evaluation.report import (
  GENERATED,
  GROUND_TRUTH,
  HELD_OUT,
  RECONSTRUCTED,
  Report,
  Row,
  check_options,
  differences,
  hash_items,
  model_figures,
  percent,
  protocol,
  summaries,
)

CANDIDATES = 32
HARD = 16
RELATIONS = 3  # number of wrong relations between two objects
_POOL = 4  # scenes composed per trial (at least 256 in all), for distinct captions and distractors
TIE = 1e-6  # cosines closer than this count as equal
# Bars that `verdict` checks.
_GROUND_TRUTH_BAR = 0.6  # accuracy on ground truth, the quality of the evaluator network
_SHARE_BAR = 0.5  # accuracy on generated images, relative to ground truth
_CHANCES_BAR = 3  # accuracy of a quickstart run, relative to chance


@dataclasses.dataclass(frozen=True)
class Trial:
  """A caption and its distractors.

  Attributes:
    caption: the true caption, which is also the prompt of the generator.
    hard: (kind, caption) of distractors that differ in one detail, which `kind` names.
    others: captions of other images.
    relations: captions with another spatial relation; not candidates, but reported separately.
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
  """Scores of one set of N images.

  Attributes:
    credit: float [N]: 1 if the true caption scores highest, 1 / m if it ties with m - 1 others,
      else 0.
    hard: the same among the true caption and its hard distractors only.
    lost_to: kind of distractor -> [N], the credit of distractors of this kind.
    relation: float [N, 2]: number of relation distractors that score below the true caption, with
      half credit for ties, and of all.
  """

  credit: np.ndarray
  hard: np.ndarray
  lost_to: Mapping[str, np.ndarray]
  relation: np.ndarray

  @functools.cached_property
  def figures(self) -> dict[str, Figure]:
    """Figures by name: the means of credits, and the share of relations if there are any."""
    figures = {'accuracy': intervals.share(self.credit), 'hard': intervals.share(self.hard)}
    if self.relation.any():
      figures['relation'] = intervals.ratio(*self.relation.T)
    return figures

  @property
  def accuracy(self) -> float:
    """Share of images that retrieve their own caption."""
    return self.figures['accuracy'].value

  def summary(self) -> dict[str, Any]:
    """Plain numbers, for a table or JSON."""
    lost_to = {kind: intervals.share(credit) for kind, credit in self.lost_to.items()}
    return {
      'images': len(self.credit),
      **summaries(self.figures),
      'lost_to': summaries(lost_to),
    }


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """Retrieval of held-out captions; see vpe_jax.evaluation.evaluator.Evaluator.

  Attributes:
    captions: number of captions of each split.
    splits: held-out splits of the data.
    seed: seed of the captions and their distractors.
    evaluator_network: weights of the evaluator network.
  """

  requires = (Samples,)
  tasks = ('captions',)
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
    """Retrieval accuracy of true and generated images, also with permuted captions."""
    network = EvaluatorNetwork.load(self.evaluator_network)
    results, lines, sheets, figures, captions = {}, [], {}, {}, []
    for split in self.splits:
      start = time.time()
      trials, records = make_trials(self.captions, split, self.seed)
      vectors_of = embed(network.captions, trials)
      prompts = [trial.caption for trial in trials]
      true = np.stack([render(record, subject.image_size) for record in records])
      rows, outcomes = rows_of(subject, prompts, true), {}
      for row, images in rows.items():
        vectors = network.images(images)
        outcomes[row] = measure(vectors, vectors_of, trials)
        if row in (GROUND_TRUTH, GENERATED):
          outcomes[f'{row}, captions permuted'] = permuted(vectors, vectors_of, trials)
      lines += table(split, outcomes)
      by_row = {row: result.figures for row, result in outcomes.items()}
      figures |= model_figures(f'retrieval/{split}', by_row, ('accuracy',))
      captions.append(prompts)
      results[split] = {
        'rows': {row: result.summary() for row, result in outcomes.items()},
        'differences': {name: summaries(pair) for name, pair in differences(by_row).items()},
        'generated_over_true': _ratio(outcomes),
        'bars': verdict(outcomes),
        'seconds': round(time.time() - start, 1),
        'captions': [
          {'caption': caption, 'true': float(a), 'generated': float(b)}
          for caption, a, b in zip(
            prompts, outcomes[GROUND_TRUTH].credit, outcomes[GENERATED].credit
          )
        ],
      }
      sheets[split] = tuple(
        Row.first(name, images, prompts if name == GROUND_TRUTH else ())
        for name, images in rows.items()
        if name != RECONSTRUCTED
      )
    question = 'does the image score highest with its own caption?'
    details = {
      'candidates': CANDIDATES,
      'hard_distractors': HARD,
      'chance': 1 / CANDIDATES,
      'ties': f'captions whose cosines differ by at most {TIE} share the credit',
      'permuted': 'each image against trials of other images, up to 16 cyclic shifts',
      'relations': 'true caption against one with another relation, not among the candidates',
      'source': 'vpe_jax.data.embedded.scenes',
      'evaluator_network_checkpoint': network.fingerprint,
    }
    record = protocol(self, 'retrieval', question, subject, results, **details)
    return Report(figures, tuple(lines), record, sheets, hash_items(*captions))


def make_trials(count: int, split: Split, seed: int = 0) -> tuple[list[Trial], list[Record]]:
  """Samples `count` scenes of a split with distinct captions, and distractors for each.

  Hard distractors have the wording of the true caption with one object, colour or count changed.
  `others` are captions of other scenes of the split. A scene whose objects all occur in the true
  image (regardless of position, size and background) is excluded, as its caption could be true.
  Scenes with fewer than `HARD` near misses (some single shapes) are skipped.

  Returns:
    The trials and their records, in the same order.

  Raises:
    UserError: the split has too few captions.
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
    raise UserError(
      f'captions={count}: the first {len(source)} scenes of the split {split} have only '
      f'{len(trials)} usable captions: ask for fewer'
    )
  return trials, records


def measure(
  images: np.ndarray, captions: Mapping[str, np.ndarray], trials: Sequence[Trial]
) -> Result:
  """Scores images against the candidates of their trials.

  Args:
    images: unit vectors [N, D], one for each trial.
    captions: caption -> unit vector [D], for every caption in the trials.
    trials: N trials; a permuted list gives the control.

  Raises:
    ValueError: the numbers of images and trials differ.
  """
  if len(images) != len(trials):
    raise ValueError(f'{len(images)} images for {len(trials)} trials')
  credit, hard, relation = [], [], np.zeros((len(trials), 2))
  kinds = sorted({kind for trial in trials for kind in trial.kinds} - {'true'})
  lost = {kind: np.zeros(len(trials)) for kind in kinds}
  for i, (image, trial) in enumerate(zip(images, trials)):
    scores = np.stack([captions[caption] for caption in trial.candidates]) @ image
    best = scores >= scores.max() - TIE
    credit.append(_share(best))
    hard_scores = scores[: 1 + len(trial.hard)]
    hard.append(_share(hard_scores >= hard_scores.max() - TIE))
    for kind, won in zip(trial.kinds[1:], best[1:] / best.sum()):
      lost[kind][i] += won
    for caption in trial.relations:
      margin = scores[0] - captions[caption] @ image
      relation[i] += 0.5 if abs(margin) <= TIE else float(margin > 0), 1
  return Result(np.asarray(credit), np.asarray(hard), lost, relation)


def permuted(
  images: np.ndarray,
  captions: Mapping[str, np.ndarray],
  trials: Sequence[Trial],
  rounds: int = 16,
) -> Result:
  """The control: every image is scored against trials of other images.

  The trials are shifted cyclically by `rounds` distances, so that no image meets its own caption. A
  good evaluator network scores below chance here: 16 of the candidates are variants of the true
  caption, and an image of another scene is usually closer to one of them than to the true caption.
  Scores are means over the rounds.
  """
  rounds = min(rounds, len(trials) - 1)
  distances = [1 + i * (len(trials) - 1) // rounds for i in range(rounds)]
  shifted = [[*trials[d:], *trials[:d]] for d in distances]
  results = [measure(images, captions, trials) for trials in shifted]
  over_rounds = lambda name: np.mean([getattr(result, name) for result in results], axis=0)
  lost_to = {
    kind: np.mean([result.lost_to[kind] for result in results], axis=0)
    for kind in results[0].lost_to
  }
  return Result(over_rounds('credit'), over_rounds('hard'), lost_to, over_rounds('relation'))


def embed(
  encode: Callable[[list[str]], np.ndarray], trials: Sequence[Trial]
) -> dict[str, np.ndarray]:
  """Caption -> unit vector [D], for every caption in the trials; each is encoded once."""
  texts = sorted({c for trial in trials for c in (*trial.candidates, *trial.relations)})
  return dict(zip(texts, encode(texts)))


def table(split: str, outcomes: Mapping[str, Result]) -> list[str]:
  """The results of one split as aligned lines."""
  chance, among = 1 / CANDIDATES, 1 / (1 + HARD)
  title = (
    f'split {split}: share of images that score highest with their own caption among {CANDIDATES} '
    f'(chance {chance:.1%}), among {1 + HARD} with hard distractors only (chance {among:.1%}), '
    'and against one with another relation (chance 50%); 95% intervals'
  )
  by_row = {row: result.figures for row, result in outcomes.items()}
  columns = {
    f'among {CANDIDATES}': ('accuracy', percent),
    'hard only': ('hard', percent),
    'relation': ('relation', percent),
  }
  lines = [title, *report.table(columns, by_row)]
  if by_row[GROUND_TRUTH]['accuracy'].interval[0] <= chance:
    return [
      *lines,
      '  ground truth scores no better than chance: the evaluator network is not reliable on this '
      'split',
    ]
  lines.append(f'  generated images reach {_ratio(outcomes):.0%} of the accuracy of ground truth')
  status = {True: 'reached', False: 'not reached'}
  return lines + [f'  bar: {bar}: {status[passed]}' for bar, passed in verdict(outcomes).items()]


def verdict(outcomes: Mapping[str, Result]) -> dict[str, bool]:
  """Description of each bar of the protocol -> whether the results of one split reach it."""
  chance = 1 / CANDIDATES
  true, generated = outcomes[GROUND_TRUTH].accuracy, outcomes[GENERATED].accuracy
  permuted = [result.accuracy for row, result in outcomes.items() if row.endswith('permuted')]
  return {
    f'ground truth at least {_GROUND_TRUTH_BAR:.0%}': true >= _GROUND_TRUTH_BAR,
    f'generated at least {_SHARE_BAR:.0%} of ground truth': generated >= _SHARE_BAR * true > 0,
    f'generated at least {_CHANCES_BAR} x chance ({_CHANCES_BAR * chance:.1%}), the bar of a '
    'quickstart run': generated >= _CHANCES_BAR * chance,
    f'permuted at most chance ({chance:.1%})': max(permuted, default=0.0) <= chance,
  }


def _ratio(outcomes: Mapping[str, Result]) -> float | None:
  """Accuracy of generated images relative to ground truth; None if the latter is 0."""
  true = outcomes[GROUND_TRUTH].accuracy
  return outcomes[GENERATED].accuracy / true if true else None


def _trial(record: Record, pool: Sequence[Record], rng: random.Random) -> Trial | None:
  """The trial of a record; None if there are too few wrong captions."""
  seed = rng.randrange(2**31)
  hard = distractors.distractors(record, HARD, seed)
  relations = distractors.relation_distractors(record, RELATIONS, seed)
  candidates = {record.caption, *(caption for _, caption in hard)}
  others: list[str] = []
  for other in rng.sample(pool, len(pool)):
    if len(others) == CANDIDATES - 1 - HARD:
      break
    if other.caption not in candidates and not _covers(record.truth, other.truth):
      candidates.add(other.caption)
      others.append(other.caption)
  if len(candidates) < CANDIDATES:
    return None
  return Trial(record.caption, tuple(hard), tuple(others), tuple(c for _, c in relations))


def _covers(truth: Truth, other: Truth) -> bool:
  """Whether `truth` contains at least as many of each object as `other`."""
  return _object_counts(other) <= _object_counts(truth)


def _object_counts(truth: Truth) -> collections.Counter[tuple[str, str | None]]:
  """Number of objects of each (name, colour)."""
  counts: collections.Counter[tuple[str, str | None]] = collections.Counter()
  for cluster in truth.clusters:
    counts[cluster.name, cluster.colour] += cluster.count
  return counts


def _share(best: np.ndarray) -> float:
  """Credit of the true caption, which is the first candidate; `best` [C] marks the highest."""
  return float(best[0]) / float(best.sum())
