"""Figures and their resampled intervals: coverage, pairs, shares without variance, and bias."""

import dataclasses

import numpy as np
import pytest

from vpe_jax.evaluation import frechet, intervals


def _normal(count, width, seed):
  return np.random.default_rng(seed).normal(size=(count, width))


def test_figures_are_means_and_ratios_of_sums():
  assert intervals.mean(np.array([1.0, 2.0, 6.0])).value == 3
  assert intervals.ratio([1, 0, 3], [2, 4, 2]).value == 0.5
  assert intervals.ratio([0, 0], [0, 0]).value == 0


@pytest.mark.parametrize(
  'draw, truth',
  [
    (lambda rng: intervals.share(rng.random(200) < 0.3), 0.3),
    (lambda rng: intervals.mean(rng.exponential(size=200)), 1.0),
    (lambda rng: intervals.ratio(2 * (n := rng.integers(1, 5, 200)) * rng.random(200), n), 1.0),
  ],
)
def test_intervals_cover_the_truth_in_about_95_percent_of_samples(draw, truth):
  samples = [draw(np.random.default_rng(seed)).interval for seed in range(200)]
  covered = np.mean([low <= truth <= high for low, high in samples])
  assert 0.9 <= covered <= 0.99


def test_a_paired_difference_is_narrower_than_that_of_independent_images():
  base = _normal(300, 1, 0)[:, 0]
  ours, theirs = intervals.mean(base + 0.1), intervals.mean(base)
  low, high = (ours - theirs).interval
  assert (low, high, (ours - theirs).value) == pytest.approx((0.1, 0.1, 0.1))
  low, high = (intervals.mean(_normal(300, 1, 1)[:, 0]) - theirs).interval
  assert high - low > 0.2
  with pytest.raises(ValueError, match='300 and 3'):
    ours - intervals.mean(np.zeros(3))


def test_resamples_are_the_same_each_time():
  values = _normal(50, 1, 3)[:, 0]
  first = intervals.mean(values).interval
  intervals.draws.cache_clear()
  assert intervals.mean(values).interval == first
  assert intervals.draws(50, 7).sum(1).tolist() == [50] * 7


def test_shares_of_0_and_1_have_wilson_intervals():
  assert intervals.share(np.zeros(10)).interval == pytest.approx((0, 0.2775), abs=1e-3)
  assert intervals.share(np.ones(10)).interval == pytest.approx((0.7225, 1), abs=1e-3)
  assert intervals.wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_a_single_image_has_no_interval():
  figure = intervals.mean(np.array([2.0]))
  assert figure.summary() == {'value': 2.0, 'interval95': None}


def test_numbers_that_are_not_finite_are_none_in_json():
  figure = intervals.mean(np.array([1.0, np.nan]))
  assert figure.summary() == {'value': None, 'interval95': None}


def test_the_interval_of_a_frechet_distance_contains_it_although_resamples_are_biased():
  figure = frechet.figure(_normal(80, 20, 0), _normal(80, 20, 1))
  assert figure.value == frechet.distance(_normal(80, 20, 0), _normal(80, 20, 1))
  low, high = figure.interval
  assert low < figure.value < high and figure.bias > 0
  # Without the shift, the interval lies above the distance.
  assert dataclasses.replace(figure, is_biased=False).interval[0] > figure.value


def test_resampled_frechet_distances_are_those_of_the_repeated_vectors():
  ours, theirs = _normal(30, 4, 2), _normal(40, 4, 3)
  weights = intervals.draws(30, 3)
  repeated = [np.repeat(ours, row.astype(int), axis=0) for row in weights]
  expected = [frechet.distance(vectors, theirs) for vectors in repeated]
  np.testing.assert_allclose(frechet.distances(ours, theirs, weights), expected, rtol=1e-9)
