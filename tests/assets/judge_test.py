"""The shipped judge meets its bar: 60 % of true pictures, with near misses among the captions."""

import numpy as np

from vpe_jax.data.records import render
from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork

COUNT = 256


def test_true_pictures_of_held_out_combinations_find_their_captions():
  judge = EvaluatorNetwork.load()
  trials, records = retrieval.make_trials(COUNT, 'combination')
  captions = retrieval.embed(judge.captions, trials)
  vectors = judge.images(np.stack([render(record, 64) for record in records]))
  assert retrieval.measure(vectors, captions, trials).accuracy >= 0.6
  assert retrieval.permuted(vectors, captions, trials).accuracy <= 1 / retrieval.CANDIDATES
