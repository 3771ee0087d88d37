"""Benchmarks of visual prompts: the best of many by a ranker, and mixes of two.

`best_of` writes several visual prompts for each held-out caption and renders the first one and the
best by each ranker. An independent evaluator network measures whether the images retrieve their
captions. Rankers never see the image, and the evaluator network never sees the visual prompt.

`mixes` combines the upper rows of one visual prompt with the lower rows of another, renders the
mix, and reads the visual prompt of the image. If the renderer follows its visual prompt, these
codes agree with the mix more often than with either of the two. The renderer may also see the
caption, which favours the visual prompt that was written for it. So there are three kinds of mixes:
of two visual prompts of one caption, and of two captions, rendered with the first or the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vpe_jax.contracts import PlansVisually, UserError
from vpe_jax.data.records import render
from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.evaluator import Lowered, Subject, stacked
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import HELD_OUT, Report, Row, check_options, protocol
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
    results, lines, sheets, numbers = {}, [], {}, {}
    for split in self.splits:
      trials, records = retrieval.make_trials(self.captions, split, self.seed)
      prompts = [trial.caption for trial in trials]
      rows = images_by_ranking(subject, prompts, n)
      rows['ground truth'] = np.stack([render(record, subject.image_size) for record in records])
      vectors_of = retrieval.embed(network.captions, trials)
      outcomes = {
        name: retrieval.measure(network.images(images), vectors_of, trials)
        for name, images in rows.items()
      }
      best_rows = [name for name in outcomes if name.startswith('best')]
      gained = {name: gain(outcomes[name], outcomes[FIRST]) for name in best_rows}
      lines += _best_of_lines(split, outcomes, gained)
      for name in best_rows:
        numbers[f'best_of/{split}/{name}'] = outcomes[name].accuracy
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
    return Report(numbers, tuple(lines), record, sheets)


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
    results, lines, sheets, numbers = {}, [], {}, {}
    for split in self.splits:
      trials, _ = retrieval.make_trials(2 * self.count, split, self.seed)
      visual_prompts = prompter.write([trial.caption for trial in trials], 2, seed, settings)
      rows, outcomes = {}, {}
      for name, (upper, lower, prompts) in _pairs(visual_prompts, self.count).items():
        mix = mixed(upper, lower)
        rows[name] = stacked(prompter.render(mix.with_prompts(prompts), seed, settings))
        expected = {'mix': mix.codes, 'A': upper.codes, 'B': lower.codes}
        outcomes[name] = agreement(prompter.read(list(rows[name])).codes, expected)
        numbers[f'mixes/{split}/{name}'] = outcomes[name]['agrees_with']['mix']
      alone = stacked(prompter.render(upper, seed, settings))
      own = float(np.mean(prompter.read(list(alone)).codes == upper.codes))
      lines += _mixes_lines(f'split {split}: {self.count} mixes', mix.side, own, outcomes)
      results[split] = {'rows': outcomes, 'unmixed': own, 'captions': list(upper.prompts)}
      sheets[split] = tuple(Row.first(*row) for row in [('A', alone), *rows.items()])
    question = "is the visual prompt of a mix's image closer to the mix than to its parts?"
    record = protocol(self, 'mixes', question, subject, results, source=_SOURCE)
    return Report(numbers, tuple(lines), record, sheets)


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
  """Gain in retrieval accuracy of one result over another, with a normal 95 % interval."""
  difference = ours.credit - theirs.credit
  mean, half = _mean(difference)
  return {
    'accuracy': mean,
    'interval95': [mean - half, mean + half],
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


def agreement(read: np.ndarray, expected: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Shares of the codes `read` [n, P] that equal mix, A and B, and the lead of the mix."""
  shares = {name: np.mean(read == codes, axis=1) for name, codes in expected.items()}
  ahead = {}
  for name in ('A', 'B'):
    mean, half = _mean(shares['mix'] - shares[name])
    ahead[name] = {'mean': mean, 'interval95': [mean - half, mean + half]}
  mean = {name: float(np.mean(share)) for name, share in shares.items()}
  return {
    'agrees_with': mean,
    'mix_ahead_of': ahead,
    'closer_to_the_mix': all(mean['mix'] > mean[name] for name in ahead),
    'a_and_b': float(np.mean(expected['A'] == expected['B'])),
  }


def _mean(values: np.ndarray) -> tuple[float, float]:
  """The mean, and half the width of its normal 95 % interval."""
  half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
  return float(np.mean(values)), float(half)


def _best_of_lines(
  split: str, outcomes: Mapping[str, retrieval.Result], gained: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  lines = [
    f'split {split}: own caption first among {retrieval.CANDIDATES} '
    f'(chance {1 / retrieval.CANDIDATES:.1%}), and against {FIRST}',
    f'  {"images":28}{"among 32":>10}{"95% interval":>18}{"hard only":>12}{"gained":>8}'
    f'{"95% interval":>18}{"captions":>14}',
  ]
  for name, result in outcomes.items():
    low, high = result.interval
    line = f'  {name:28}{result.accuracy:>10.1%}{f"{low:.1%} to {high:.1%}":>18}'
    line += f'{result.hard.mean():>12.1%}'
    if name in gained:
      low, high = gained[name]['interval95']
      captions = f'+{gained[name]["captions_gained"]} -{gained[name]["captions_lost"]}'
      line += f'{gained[name]["accuracy"]:>+8.1%}{f"{low:+.1%} to {high:+.1%}":>18}{captions:>14}'
    lines.append(line)
  return lines


def _mixes_lines(
  title: str, side: int, own: float, outcomes: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  lines = [
    f'{title} of the top {side // 2} of {side} rows of A over the others of B: share of codes '
    f'read from the image that equal each (of an image of A alone, {own:.1%} equal those of A)',
    f'  {"mixed and rendered":28}{"the mix":>9}{"A":>8}{"B":>8}{"A and B":>9}'
    f'{"ahead of A":>26}{"of B":>26}',
  ]
  for name, row in outcomes.items():
    shares, line = row['agrees_with'], f'  {name:28}'
    line += f'{shares["mix"]:>9.1%}{shares["A"]:>8.1%}{shares["B"]:>8.1%}{row["a_and_b"]:>9.1%}'
    for ahead in row['mix_ahead_of'].values():
      (low, high), mean = ahead['interval95'], ahead['mean']
      line += f'{f"{mean:+.1%} ({low:+.1%} to {high:+.1%})":>26}'
    lines.append(line)
  return lines
