"""The Frechet distance of two sets of vectors, each modelled as a normal distribution."""

from __future__ import annotations

import numpy as np

from vpe_jax.evaluation.intervals import Figure

RESAMPLES = 200  # of the vectors, for the interval; each takes a decomposition


def figure(ours: np.ndarray, theirs: np.ndarray) -> Figure:
  """The distance of vectors [N, D] from reference vectors [M, D]; only `ours` are resampled.

  A resample repeats vectors, which raises its distance: `is_biased` shifts the interval back.
  """
  statistic = lambda weights: distances(ours, theirs, weights)
  return Figure(len(ours), statistic, RESAMPLES, is_biased=True)


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The distance of vectors [N, D] and [M, D], at least two of each; see `distances`."""
  return float(distances(ours, theirs, np.ones((1, len(ours))))[0])


def distances(ours: np.ndarray, theirs: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """|m - m'|^2 + Tr(S + S' - 2 (S S')^1/2), with means m and unbiased covariances S.

  With S' = A^T A, the trace of (S S')^1/2 is the sum of the square roots of the eigenvalues of
  A S A^T, which is symmetric. Covariances may be singular, as with fewer vectors than dimensions.

  Args:
    ours: float [N, D].
    theirs: float [M, D], at least two vectors.
    weights: float [R, N], how often each of our vectors occurs; each row sums to at least 2.

  Returns:
    Distances [R].
  """
  ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
  their_mean = theirs.mean(0)
  root = np.linalg.qr(theirs - their_mean, mode='r') / np.sqrt(len(theirs) - 1)
  results = []
  for row in weights:
    mean = row @ ours / row.sum()
    centred = ours - mean
    covariance = centred.T @ (row[:, None] * centred) / (row.sum() - 1)
    eigenvalues = np.linalg.eigvalsh(root @ covariance @ root.T)
    # Rounding may make eigenvalues of 0, and the distance of equal sets, slightly negative.
    shared = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    traces = np.trace(covariance) + np.square(root).sum()
    results.append(max(0.0, np.square(mean - their_mean).sum() + traces - 2 * shared))
  return np.asarray(results)
