"""What visual prompts are worth as things of their own: the best of many, and mixes of two.

`best_of` writes several plans for each held-out caption and renders the first of them, and the best
by each ranker, from the noise that belongs to its place. The independent judge says whether the
pictures retrieve their captions: rankers see the plan alone, and the judge the picture alone.

`mixes` puts the upper rows of one plan over the lower rows of another, renders that, and reads the
plan of the picture. If the renderer follows the plan, what is read agrees with the mix in more
places than with either of the two. It also sees the words, and those of one caption speak for its
plan: so the two are of one caption, and of two with the words of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vpe_jax.contracts import UserError
from vpe_jax.data.records import render
from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.judge import Judge
from vpe_jax.evaluation.report import Options, Planner, Report, Row, Subject, protocol
from vpe_jax.sampling.plans import Plans, best, mixed

FIRST = 'the first plan'
_SOURCE = 'vpe_jax.data.embedded.scenes'


def best_of_report(subject: Subject, options: Options) -> Report:
  """Retrieval of held-out captions from the best of `options.best_of` plans, and from any one.

  Raises:
    UserError: the subject has no visual prompts.
  """
  planner, judge, n = _planner(subject), Judge.load(options.judge), options.best_of
  results, lines, sheets = {}, [], {}
  for split in options.splits:
    trials, records = retrieval.make_trials(options.captions, split, options.seed)
    told = [trial.caption for trial in trials]
    drawn = chosen(planner, told, n)
    drawn['true images'] = np.stack([render(record, subject.image_size) for record in records])
    captions = retrieval.embed(judge.captions, trials)
    found = {
      name: retrieval.measure(judge.images(images), captions, trials)
      for name, images in drawn.items()
    }
    gained = {name: gain(found[name], found[FIRST]) for name in found if name.startswith('best')}
    lines += _best_of_lines(split, found, gained)
    results[split] = {
      'rows': {name: result.summary() for name, result in found.items()},
      'gained': gained,
      'captions': told,
      'credit': {name: result.credit.tolist() for name, result in found.items()},
    }
    *rows, last = (Row.first(name, images) for name, images in drawn.items())
    sheets[split] = (*rows, Row.first(last.label, last.images, told))
  question = f'do the best of {n} plans, by each ranker, draw better pictures than the first?'
  said = {'source': _SOURCE, 'judge_checkpoint': judge.fingerprint}
  return Report(
    tuple(lines), protocol('best_of', question, subject, options, results, **said), sheets
  )


def chosen(planner: Planner, captions: list[str], n: int) -> dict[str, np.ndarray]:
  """Pictures of each caption's first of `n` plans, and of the best by each ranker."""
  written = planner.plan(captions, n)
  first = n * np.arange(len(captions))
  drawn = {FIRST: planner.render(written.take(first))}
  for ranker in planner.rankers:
    places = best(planner.score(written, ranker).reshape(-1, n), 1)[:, 0]
    drawn[f'best of {n} by {ranker}'] = planner.render(written.take(first + places))
  return drawn


def gain(ours: retrieval.Result, theirs: retrieval.Result) -> dict[str, Any]:
  """How much more of the same captions one row retrieves, with a normal 95 % interval."""
  difference = ours.credit - theirs.credit
  mean, half = _mean(difference)
  return {
    'accuracy': mean,
    'interval95': [mean - half, mean + half],
    'captions_gained': int(np.sum(difference > 0)),
    'captions_lost': int(np.sum(difference < 0)),
  }


def mixes_report(subject: Subject, options: Options) -> Report:
  """Whether pictures of mixed plans show the mix.

  Raises:
    UserError: the subject has no visual prompts.
  """
  planner, count = _planner(subject), options.mixes
  results, lines, sheets = {}, [], {}
  for split in options.splits:
    trials, _ = retrieval.make_trials(2 * count, split, options.seed)
    plans = planner.plan([trial.caption for trial in trials], 2)
    drawn, found = {}, {}
    for name, (upper, lower, words) in _pairs(plans, count).items():
      mix = mixed(upper, lower)
      drawn[name] = planner.render(mix.told(words))
      meant = {'mix': mix.codes, 'A': upper.codes, 'B': lower.codes}
      found[name] = agreement(planner.read(drawn[name], words).codes, meant)
    alone = planner.render(upper)
    own = float(np.mean(planner.read(alone, upper.prompts).codes == upper.codes))
    lines += _mixes_lines(f'split {split}: {count} mixes', mix.side, own, found)
    results[split] = {'rows': found, 'unmixed': own, 'captions': list(upper.prompts)}
    sheets[split] = tuple(Row.first(*row) for row in [('A', alone), *drawn.items()])
  question = 'is the plan of the picture of a mix closer to the mix than to what was mixed?'
  said = {'source': _SOURCE}
  return Report(
    tuple(lines), protocol('mixes', question, subject, options, results, **said), sheets
  )


def _pairs(plans: Plans, count: int) -> dict[str, tuple[Plans, Plans, tuple[str, ...]]]:
  """What is mixed (A above, B below), and the words that the mix is rendered with.

  Args:
    plans: two of each of 2 * `count` captions.
    count: pairs of each kind.
  """
  of_caption = lambda first, place: plans.take(2 * np.arange(first, first + count) + place)
  a, again, b = of_caption(0, 0), of_caption(0, 1), of_caption(count, 0)
  return {
    'two plans of one caption': (a, again, a.prompts),
    "two captions, A's words": (a, b, a.prompts),
    "two captions, B's words": (a, b, b.prompts),
  }


def agreement(read: np.ndarray, meant: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Shares of codes of the plans [n, P] that are those meant, and how far the mix is ahead."""
  shares = {name: np.mean(read == codes, axis=1) for name, codes in meant.items()}
  ahead = {}
  for name in ('A', 'B'):
    mean, half = _mean(shares['mix'] - shares[name])
    ahead[name] = {'mean': mean, 'interval95': [mean - half, mean + half]}
  mean = {name: float(np.mean(share)) for name, share in shares.items()}
  return {
    'agrees_with': mean,
    'mix_ahead_of': ahead,
    'closer_to_the_mix': all(mean['mix'] > mean[name] for name in ahead),
    'a_and_b': float(np.mean(meant['A'] == meant['B'])),
  }


def _planner(subject: Subject) -> Planner:
  if subject.planner is None:
    raise UserError('this model draws without visual prompts: benchmarks of them have no subject')
  return subject.planner


def _mean(values: np.ndarray) -> tuple[float, float]:
  """The mean, and half the width of its normal 95 % interval."""
  half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
  return float(np.mean(values)), float(half)


def _best_of_lines(
  split: str, found: Mapping[str, retrieval.Result], gained: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  lines = [
    f'split {split}: own caption first among {retrieval.CANDIDATES} '
    f'(chance {1 / retrieval.CANDIDATES:.1%}), and against {FIRST}',
    f'  {"pictures":28}{"among 32":>10}{"95% interval":>18}{"hard only":>12}{"gained":>8}'
    f'{"95% interval":>18}{"captions":>14}',
  ]
  for name, result in found.items():
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
  title: str, side: int, own: float, found: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  lines = [
    f'{title} of the top {side // 2} of {side} rows of A over the others of B: how many codes of '
    f"the picture's own plan are those of each (of a picture of A alone, {own:.1%} are those of A)",
    f'  {"mixed and rendered":28}{"the mix":>9}{"A":>8}{"B":>8}{"A and B":>9}'
    f'{"ahead of A":>26}{"of B":>26}',
  ]
  for name, row in found.items():
    shares, line = row['agrees_with'], f'  {name:28}'
    line += f'{shares["mix"]:>9.1%}{shares["A"]:>8.1%}{shares["B"]:>8.1%}{row["a_and_b"]:>9.1%}'
    for ahead in row['mix_ahead_of'].values():
      (low, high), mean = ahead['interval95'], ahead['mean']
      line += f'{f"{mean:+.1%} ({low:+.1%} to {high:+.1%})":>26}'
    lines.append(line)
  return lines
