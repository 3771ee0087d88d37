"""The shipped evaluator network finds the captions of 60 % of ground-truth images.

The captions to choose from include near misses.
"""

import numpy as np

from vpe_jax.data.records import render
from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork

COUNT = 256


def test_ground_truth_of_held_out_combinations_retrieves_its_captions():
  evaluator = EvaluatorNetwork.load()
  trials, records = retrieval.make_trials(COUNT, 'combination')
  captions = retrieval.embed(evaluator.captions, trials)
  vectors = evaluator.images(np.stack([render(record, 64) for record in records]))
  assert retrieval.measure(vectors, captions, trials).accuracy >= 0.6
  assert retrieval.permuted(vectors, captions, trials).accuracy <= 1 / retrieval.CANDIDATES
