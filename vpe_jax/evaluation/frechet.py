"""The Frechet distance of two sets of vectors, each modelled as a normal distribution."""

from __future__ import annotations

import numpy as np


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
  """|m - m'|^2 + Tr(S + S' - 2 (S S')^1/2), with means m and unbiased covariances S.

  The trace of the matrix root is the sum of the singular values of R R'^T, where S = R^T R. No
  covariance is formed, so the result is accurate even if covariances are singular, as with fewer
  vectors than dimensions.

  Args:
    ours: float [N, D], at least two vectors.
    theirs: float [M, D], at least two vectors.
  """
  means = [vectors.astype(np.float64).mean(0) for vectors in (ours, theirs)]
  roots = [
    np.linalg.qr(vectors - mean, mode='r') / np.sqrt(len(vectors) - 1)
    for vectors, mean in zip((ours, theirs), means)
  ]
  shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
  traces = sum(np.square(root).sum() for root in roots)
  # The distance of equal sets may be slightly negative because of rounding.
  return max(0.0, float(np.square(means[0] - means[1]).sum() + traces - 2 * shared))
