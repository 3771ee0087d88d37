"""The shipped generator has the config of configs/t2i.py and renders held-out captions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs import t2i
from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import differences
from vpe_jax.data.records import render
from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.generator import Generator
from vpe_jax.training import metrics, reference

COUNT = 64


@pytest.fixture(scope='module')
def metadata():
  return weights.load('assets:tiny')[1]


@pytest.fixture(scope='module')
def generator():
  return Generator.load('assets:tiny', batch_size=32)


def _records():
  return metrics.parse((reference.ASSETS / 't2i-tiny.metrics.jsonl').read_text())


def test_was_trained_longer_than_its_config(metadata):
  config = systems.build(t2i.get_config().to_dict()).config
  assert 'data.examples' in differences(config, json.loads(metadata['config']))
  assert int(metadata['step']) > sum(config.steps)


def test_metrics_have_every_step_once(metadata):
  records, steps = _records(), json.loads(metadata['config'])['steps']
  assert [record['step'] for record in records] == list(range(1, int(metadata['step']) + 1))
  stage_lengths = [sum(record['stage'] == name for record in records) for name in ('plan', 'joint')]
  assert stage_lengths == list(steps)


def test_losses_decrease():
  records = _records()
  first, last = ([r['loss'] for r in records if r['stage'] == s] for s in ('plan', 'joint'))
  assert np.mean(first[-20:]) < 0.4 * first[0] and np.mean(last[-20:]) < 0.6 * last[0]


def test_the_codec_alone_reconstructs_held_out_images(generator):
  _, records = retrieval.make_trials(8, 'combination')
  true = np.stack([render(record, 64) for record in records])
  error = np.square(generator.reconstruct(list(true)) - true.astype(float)).mean()
  assert 27 < 10 * np.log10(255**2 / error) < 40


def test_samples_match_held_out_captions(generator):
  """An eighth of the protocol of vpe_jax.evaluate, with its threshold of three times chance."""
  trials, _ = retrieval.make_trials(COUNT, 'combination')
  evaluator = EvaluatorNetwork.load()
  settings = generator.settings(steps=12)
  samples = generator([trial.caption for trial in trials], settings=settings)
  vectors = evaluator.images(np.stack([sample.image for sample in samples]))
  captions = retrieval.embed(evaluator.captions, trials)
  chance = 1 / retrieval.CANDIDATES
  assert retrieval.measure(vectors, captions, trials).accuracy >= 3 * chance
  assert retrieval.permuted(vectors, captions, trials).accuracy <= 1.5 * chance
