"""Benchmarks of visual prompts, on a model whose images show their codes."""

import json
import types

import numpy as np
import pytest

from vpe_jax.contracts import PlansVisually, Samples
from vpe_jax.evaluation import retrieval, runner
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.systems.vpe.visual_prompts import benchmark
from vpe_jax.systems.vpe.visual_prompts.files import Codebook, VisualPrompts

N, SIDE = 4, 2
BEST_OF = benchmark.BestOf(captions=12, splits=('combination',), seed=1, plans=N)
MIXES = benchmark.Mixes(count=6, splits=('combination',), seed=1)


def _plan(captions, n):
  """Visual prompts whose codes number their caption and themselves; the last of each is good."""
  numbers = np.arange(len(captions) * n)
  codes = np.stack([numbers // n, numbers % n, 30 + numbers // n, numbers % n], 1)
  prompts = tuple(caption for caption in captions for _ in range(n))
  index = tuple(range(n)) * len(captions)
  return VisualPrompts(codes.astype(np.int32), prompts, index, Codebook(64, 'abc'), {})


def _score(plans, ranker):
  sign = {'likelihood': 1, 'similarity': -1}[ranker]
  return sign * plans.codes[:, 1].astype(np.float32)


def _render(plans):
  """Images that show the codes and, for good visual prompts alone, the caption's number."""
  image = np.zeros((len(plans), 16, 16, 3), np.uint8)
  image[:, 0, :4, 0] = plans.codes
  image[:, 1, 0, 0] = np.where(plans.codes[:, 1] == N - 1, 1 + plans.codes[:, 0], 0)
  return image


class _Evaluator:
  """Stands in for EvaluatorNetwork: recognizes captions by their numbers in the trials."""

  fingerprint = 'knowing'

  def captions(self, captions):
    trials, _ = retrieval.make_trials(BEST_OF.captions, 'combination', BEST_OF.seed)
    self._number = {trial.caption: 1 + i for i, trial in enumerate(trials)}
    vectors = np.zeros((len(captions), 1 + len(trials)))
    for i, caption in enumerate(captions):
      vectors[i, self._number.get(caption, 0)] = 1
    return vectors

  def images(self, images):
    number = images[:, 1, 0, 0]
    return np.eye(1 + BEST_OF.captions)[np.where(number <= BEST_OF.captions, number, 0)]


class _Prompter:
  """Stands in for VisualPrompter: images show the codes."""

  system = types.SimpleNamespace(plan_rankers=('likelihood', 'similarity'))

  def __init__(self, generator):
    del generator

  def write(self, captions, n, seed, settings):
    return _plan(captions, n)

  def score(self, visual_prompts, ranker):
    return _score(visual_prompts, ranker)

  def render(self, visual_prompts, seed, settings):
    return [types.SimpleNamespace(image=image) for image in _render(visual_prompts)]

  def read(self, images):
    return types.SimpleNamespace(codes=np.stack(images)[:, 0, :4, 0].astype(np.int32))


@pytest.fixture
def subject(monkeypatch, fake_subject):
  monkeypatch.setattr(EvaluatorNetwork, 'load', lambda source: _Evaluator())
  monkeypatch.setattr(benchmark, 'VisualPrompter', _Prompter)
  subject = fake_subject(None, capabilities=(Samples, PlansVisually))
  subject.seed, subject.settings = 0, None
  return subject


def test_accuracy_gain_of_the_best_over_the_first(subject, tmp_path):
  report = BEST_OF.run(subject)
  results = report.protocol['results']['combination']
  accuracy = {name: row['accuracy']['value'] for name, row in results['rows'].items()}
  good, bad = f'best of {N} by likelihood', f'best of {N} by similarity'
  assert list(accuracy) == [benchmark.FIRST, good, bad, 'ground truth']
  assert accuracy[good] == 1 and accuracy[bad] == accuracy[benchmark.FIRST] < 0.2
  assert results['gained'][good]['captions_gained'] == 12
  assert results['gained'][good]['captions_lost'] == 0
  gained = results['gained'][good]['accuracy']
  low, high = gained['interval95']
  assert low <= gained['value'] == 1 - accuracy[benchmark.FIRST] <= high
  assert results['gained'][bad]['accuracy']['value'] == 0
  assert results['gained'][bad]['captions_gained'] == 0
  assert len(report.lines) == 10 and '+12 -0' in report.lines[8]
  assert good + ' minus' in report.lines[6]
  written = runner.save({'best_of': report}, str(tmp_path), 'x')
  protocol = json.loads((tmp_path / 'best_of-x.json').read_text())
  assert protocol['plans'] == N and protocol['evaluator_network_checkpoint'] == 'knowing'
  assert len(written) == 2


def test_a_renderer_that_follows_its_visual_prompt_shows_the_mix(subject):
  report = MIXES.run(subject)
  results = report.protocol['results']['combination']
  assert results['unmixed']['value'] == 1 and len(results['rows']) == 3
  for row in results['rows'].values():
    # In each row of codes, one numbers the caption, the other the visual prompt.
    shares = {name: figure['value'] for name, figure in row.items()}
    assert shares['A and B'] == 0.5
    assert (shares['mix'], shares['A'], shares['B']) == (1, 0.75, 0.75)
    assert row['mix minus A'] == {'value': 0.25, 'interval95': [0.25, 0.25]}
  assert len(report.lines) == 5


def test_agreement_is_measured_with_each_source():
  mix, a, b = (np.asarray([[0, 0, 1, 1]]).repeat(3, 0) * k for k in (1, 0, 1))
  b = b + np.asarray([1, 1, 0, 0])
  figures = benchmark.agreement(a, {'mix': mix, 'A': a, 'B': b})
  shares = {name: figure.value for name, figure in figures.items()}
  assert (shares['mix'], shares['A'], shares['B']) == (0.5, 1, 0)
  assert shares['mix minus A'] == -0.5 and shares['mix minus B'] == 0.5
