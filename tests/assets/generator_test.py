"""The shipped generator is what configs/t2i.py trains, and draws what held-out captions say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs import t2i
from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import differences
from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.generator import Generator
from vpe_jax.training import metrics, reference, resume

LONGER = ('steps', 'data.examples')  # it trained longer, on more pictures
COUNT = 64


@pytest.fixture(scope='module')
def metadata():
  return weights.load('assets:tiny')[1]


def _records():
  return metrics.parse((reference.ASSETS / 't2i-tiny.metrics.jsonl').read_text())


def test_its_config_is_the_shipped_one(metadata):
  config = systems.build(t2i.get_config().to_dict()).config
  differing = differences(config, json.loads(metadata['config']))
  free = (*LONGER, *resume.FREE)
  assert not [name for name in differing if not name.startswith(free)]
  assert 'data.examples' in differing and int(metadata['step']) > sum(config.steps)
  assert len(metadata['commit']) == 40 and metadata['weights'] == 'ema'


def test_its_metrics_have_every_step_once(metadata):
  records, steps = _records(), json.loads(metadata['config'])['steps']
  assert [record['step'] for record in records] == list(range(1, int(metadata['step']) + 1))
  of_stage = [sum(record['stage'] == name for record in records) for name in ('plan', 'joint')]
  assert of_stage == list(steps)


def test_its_losses_fell():
  records = _records()
  first, last = ([r['loss'] for r in records if r['stage'] == s] for s in ('plan', 'joint'))
  assert np.mean(first[-20:]) < 0.4 * first[0] and np.mean(last[-20:]) < 0.6 * last[0]


def test_it_draws_what_held_out_captions_say():
  """An eighth of the protocol of vpe_jax.evaluate, at its bar of three times chance."""
  trials, _ = retrieval.make_trials(COUNT, 'combination')
  generator, judge = Generator.load('assets:tiny', batch_size=32), EvaluatorNetwork.load()
  settings = generator.settings(steps=12)
  drawn = generator([trial.caption for trial in trials], settings=settings)
  vectors = judge.images(np.stack([picture.image for picture in drawn]))
  captions = retrieval.embed(judge.captions, trials)
  chance = 1 / retrieval.CANDIDATES
  assert retrieval.measure(vectors, captions, trials).accuracy >= 3 * chance
  assert retrieval.permuted(vectors, captions, trials).accuracy <= 1.5 * chance
