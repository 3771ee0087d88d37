"""The Frechet distance against its closed form."""

import numpy as np
import pytest

from vpe_jax.evaluation import frechet


def _normal(count, width, seed):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def _closed_form(a, b):
  means, covariances = zip(*((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)))
  root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
  squared_distance = np.square(means[0] - means[1]).sum()
  return squared_distance + np.trace(covariances[0] + covariances[1]) - 2 * root


@pytest.mark.parametrize('counts', [(50, 50), (40, 70)])
def test_distance_equals_the_closed_form(counts):
  a, b = (_normal(count, 6, seed) for seed, count in enumerate(counts))
  assert frechet.distance(a, b) == pytest.approx(_closed_form(a, b), rel=1e-9)
  assert frechet.distance(b, a) == pytest.approx(frechet.distance(a, b), rel=1e-9)


def test_shifted_and_scaled_vectors():
  a = _normal(30, 4, 0)
  variance = np.var(a, axis=0, ddof=1).sum()
  assert frechet.distance(a, a + 2) == pytest.approx(4 * 4)
  assert frechet.distance(a, a - a.mean(0) + 3 * (a - a.mean(0))) == pytest.approx(
    np.square(a.mean(0)).sum() + 9 * variance
  )


def test_fewer_vectors_than_dimensions():
  vectors = _normal(5, 40, 0).astype(np.float32)
  assert frechet.distance(vectors, vectors) == pytest.approx(0, abs=1e-3)
  shifted = vectors.copy()
  shifted[:, 0] += 10
  assert frechet.distance(vectors, shifted) == pytest.approx(100, rel=1e-4)
