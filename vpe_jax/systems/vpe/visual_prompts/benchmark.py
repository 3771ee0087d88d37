"""Benchmarks of visual prompts: the best of many by a ranker, and mixes of two.

`best_of` writes several visual prompts for each held-out caption and renders the first one and the
best by each ranker. An independent evaluator network measures whether the images retrieve their
captions. Rankers never see the image, and the evaluator network never sees the visual prompt.

`mixes` combines the upper rows of one visual prompt with the lower rows of another, renders the
mix, and reads the visual prompt of the image. If the renderer follows its visual prompt, these
codes agree with the mix more often than with either of the two. The renderer may also see the
caption, which favours the visual prompt that was written for it. So there are three kinds of mixes
of visual prompts A and B: both of one caption; of two captions, rendered with the caption of A; and
the same, rendered with the caption of B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vpe_jax.contracts import PlansVisually, UserError
from vpe_jax.data.records import render
from vpe_jax.evaluation import intervals, report, retrieval
from vpe_jax.evaluation.evaluator import Lowered, Subject, stacked
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.intervals import Figure
from vpe_jax.evaluation.report import (
  GROUND_TRUTH,
  HELD_OUT,
  Report,
  Row,
  check_options,
  hash_items,
  percent,
  protocol,
  summaries,
)
from vpe_jax.systems.vpe.visual_prompts.files import VisualPrompts, best, mixed
from vpe_jax.systems.vpe.visual_prompts.prompter import VisualPrompter

FIRST = 'the first visual prompt'
_SOURCE = 'vpe_jax.data.embedded.scenes'


@dataclasses.dataclass(frozen=True)
class BestOf:
  """Retrieval from the best of several visual prompts; see vpe_jax.evaluation.evaluator.Evaluator.

  Attributes:
    captions: number of captions of each split.
    splits: held-out splits of the data.
    seed: seed of the captions and their distractors.
    evaluator_network: weights of the evaluator network.
    plans: number of visual prompts written for each caption.
  """

  requires = (PlansVisually,)
  tasks = ('captions',)
  folder = 'evaluation'

  captions: int = 512
  splits: tuple[str, ...] = HELD_OUT
  seed: int = 0
  evaluator_network: str = 'assets:evaluator_network'
  plans: int = 16

  def check(self) -> None:
    """See Evaluator."""
    check_options(self.captions, self.splits, self.seed)
    if self.plans < 2:
      raise UserError(f'plans is {self.plans}: at least 2 are needed to choose among')

  def programs(self, subject: Subject) -> list[Lowered]:
    """See Evaluator."""
    return subject.sampling_programs()

  def run(self, subject: Subject) -> Report:
    """Retrieval accuracy of the first visual prompt and of the best by each ranker."""
    network, n = EvaluatorNetwork.load(self.evaluator_network), self.plans
    results, lines, sheets, figures, captions = {}, [], {}, {}, []
    for split in self.splits:
      trials, records = retrieval.make_trials(self.captions, split, self.seed)
      prompts = [trial.caption for trial in trials]
      rows = images_by_ranking(subject, prompts, n)
      rows[GROUND_TRUTH] = np.stack([render(record, subject.image_size) for record in records])
      vectors_of = retrieval.embed(network.captions, trials)
      outcomes = {
        name: retrieval.measure(network.images(images), vectors_of, trials)
        for name, images in rows.items()
      }
      by_row = {name: result.figures for name, result in outcomes.items()}
      best_rows = [name for name in by_row if name.startswith('best')]
      gained = {name: gain(outcomes[name], outcomes[FIRST]) for name in best_rows}
      lines += _best_of_lines(split, by_row, gained)
      for name in best_rows:
        figures[f'best_of/{split}/{name}'] = by_row[name]['accuracy']
      captions.append(prompts)
      results[split] = {
        'rows': {name: result.summary() for name, result in outcomes.items()},
        'gained': gained,
        'captions': prompts,
        'credit': {name: result.credit.tolist() for name, result in outcomes.items()},
      }
      *others, last = (Row.first(name, images) for name, images in rows.items())
      sheets[split] = (*others, Row.first(last.label, last.images, prompts))
    question = f'do the best of {n} visual prompts, by each ranker, give better images?'
    measured = {'source': _SOURCE, 'evaluator_network_checkpoint': network.fingerprint}
    record = protocol(self, 'best_of', question, subject, results, **measured)
    return Report(figures, tuple(lines), record, sheets, hash_items(*captions))


@dataclasses.dataclass(frozen=True)
class Mixes:
  """Whether images follow mixed visual prompts; see vpe_jax.evaluation.evaluator.Evaluator.

  Attributes:
    count: number of pairs of each kind, in each split.
    splits: held-out splits of the data.
    seed: seed of the captions.
  """

  requires = (PlansVisually,)
  tasks = ('captions',)
  folder = 'evaluation'

  count: int = 64
  splits: tuple[str, ...] = HELD_OUT
  seed: int = 0

  def check(self) -> None:
    """See Evaluator."""
    check_options(self.count, self.splits, self.seed, 'count')

  def programs(self, subject: Subject) -> list[Lowered]:
    """See Evaluator."""
    return subject.sampling_programs()

  def run(self, subject: Subject) -> Report:
    """Agreement of the codes read from the images with the mix and with its parts."""
    prompter, seed, settings = VisualPrompter(subject.generator), subject.seed, subject.settings
    results, lines, sheets, figures, captions = {}, [], {}, {}, []
    for split in self.splits:
      trials, _ = retrieval.make_trials(2 * self.count, split, self.seed)
      visual_prompts = prompter.write([trial.caption for trial in trials], 2, seed, settings)
      rows, outcomes = {}, {}
      for name, (upper, lower, prompts) in _pairs(visual_prompts, self.count).items():
        mix = mixed(upper, lower)
        rows[name] = stacked(prompter.render(mix.with_prompts(prompts), seed, settings))
        expected = {'mix': mix.codes, 'A': upper.codes, 'B': lower.codes}
        outcomes[name] = agreement(prompter.read(list(rows[name])).codes, expected)
        figures[f'mixes/{split}/{name}'] = outcomes[name]['mix']
      alone = stacked(prompter.render(upper, seed, settings))
      codes = prompter.read(list(alone)).codes
      own = intervals.share(np.mean(codes == upper.codes, axis=1))
      lines += _mixes_lines(f'split {split}: {self.count} mixes', mix.side, own, outcomes)
      captions.append(upper.prompts)
      results[split] = {
        'rows': {name: summaries(row) for name, row in outcomes.items()},
        'unmixed': own.summary(),
        'captions': list(upper.prompts),
      }
      sheets[split] = tuple(Row.first(*row) for row in [('A', alone), *rows.items()])
    question = "is the visual prompt of a mix's image closer to the mix than to its parts?"
    record = protocol(self, 'mixes', question, subject, results, source=_SOURCE)
    return Report(figures, tuple(lines), record, sheets, hash_items(*captions))


def images_by_ranking(subject: Subject, captions: list[str], n: int) -> dict[str, np.ndarray]:
  """Images [N, R, R, 3] of N captions: from the first of `n` visual prompts, and from the best."""
  prompter = VisualPrompter(subject.generator)
  render = lambda prompts: stacked(prompter.render(prompts, subject.seed, subject.settings))
  visual_prompts = prompter.write(captions, n, subject.seed, subject.settings)
  first = n * np.arange(len(captions))
  rows = {FIRST: render(visual_prompts.take(first))}
  for ranker in prompter.system.plan_rankers:
    places = best(prompter.score(visual_prompts, ranker).reshape(-1, n), 1)[:, 0]
    rows[f'best of {n} by {ranker}'] = render(visual_prompts.take(first + places))
  return rows


def gain(ours: retrieval.Result, theirs: retrieval.Result) -> dict[str, Any]:
  """Gain in retrieval accuracy of one result over another of the same captions."""
  difference = ours.credit - theirs.credit
  return {
    'accuracy': (ours.figures['accuracy'] - theirs.figures['accuracy']).summary(),
    'captions_gained': int(np.sum(difference > 0)),
    'captions_lost': int(np.sum(difference < 0)),
  }


def _pairs(
  visual_prompts: VisualPrompts, count: int
) -> dict[str, tuple[VisualPrompts, VisualPrompts, tuple[str, ...]]]:
  """Pairs to mix (A above, B below), and the captions with which the mixes are rendered.

  Args:
    visual_prompts: two for each of 2 * `count` captions, one caption after the other.
    count: pairs of each kind.
  """
  of_caption = lambda first, place: visual_prompts.take(2 * np.arange(first, first + count) + place)
  a, again, b = of_caption(0, 0), of_caption(0, 1), of_caption(count, 0)
  return {
    'two of one caption': (a, again, a.prompts),
    "two captions, A's caption": (a, b, a.prompts),
    "two captions, B's caption": (a, b, b.prompts),
  }


def agreement(read: np.ndarray, expected: Mapping[str, np.ndarray]) -> dict[str, Figure]:
  """Shares of the codes `read` [n, P] that equal the mix, A and B, and the lead of the mix.

  `A and B` is the share of codes that A and B have in common.
  """
  shares = {
    name: intervals.share(np.mean(read == codes, axis=1)) for name, codes in expected.items()
  }
  return {
    **shares,
    'A and B': intervals.share(np.mean(expected['A'] == expected['B'], axis=1)),
    'mix minus A': shares['mix'] - shares['A'],
    'mix minus B': shares['mix'] - shares['B'],
  }


def _best_of_lines(
  split: str,
  by_row: Mapping[str, Mapping[str, Figure]],
  gained: Mapping[str, Mapping[str, Any]],
) -> list[str]:
  title = (
    f'split {split}: own caption first among {retrieval.CANDIDATES} '
    f'(chance {1 / retrieval.CANDIDATES:.1%}), and against {FIRST}; 95% intervals'
  )
  columns = {
    f'among {retrieval.CANDIDATES}': ('accuracy', percent),
    'hard only': ('hard', percent),
  }
  pairs = [(name, FIRST) for name in gained]
  captions = [
    f'  captions of {name}: +{row["captions_gained"]} -{row["captions_lost"]}'
    for name, row in gained.items()
  ]
  return [title, *report.table(columns, by_row, pairs), *captions]


def _mixes_lines(
  title: str, side: int, own: Figure, outcomes: Mapping[str, Mapping[str, Figure]]
) -> list[str]:
  title = (
    f'{title} of the top {side // 2} of {side} rows of A over the others of B: share of codes '
    f'read from the image that equal the mix, A and B (`A and B`: that A and B have in common; of '
    f'an image of A alone, {percent(own)} equal those of A); 95% intervals'
  )
  columns = {name: (name, percent) for name in next(iter(outcomes.values()))}
  return [title, *report.table(columns, outcomes, ())]
