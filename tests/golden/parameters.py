"""Parameters for golden numbers: each leaf is a function of its path and shape alone.

Nothing is zero or the identity, so a leaf that training starts at zero counts as well. Neither JAX
nor the order of a tree has a part in it: code that names or orders leaves otherwise gets the same
arrays by their paths of before.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping

import numpy as np

_STACKED = re.compile(r'(^|/)(layers|blocks)/|dual_path/encoder/')  # their first axis is the layer
_PROJECTIONS = ('q', 'k', 'v')  # kernels [in, heads, width]; all others have their outputs last
_MEANS = {'scale': 1.0, 'logit_scale': 2.3, 'logit_bias': -3.0}
_DEVIATIONS = {'bias': 0.05, 'codebook': 1.0}
_ELSEWHERE = 0.1  # standard deviation of scales, tables of rows, positions


def redraw(path: str, shape: tuple[int, ...]) -> np.ndarray:
  """The leaf at a path: float32 normal numbers, whose scale its name decides.

  Kernels keep the variance of their inputs, scales lie about 1, codebooks have variance 1.

  Args:
    path: names joined by `/`.
    shape: of the leaf.
  """
  *parents, name = path.split('/')
  normal = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)
  if name == 'kernel':
    own = shape[1:] if _STACKED.search(path) else shape
    inputs = own[0] if parents[-1:] and parents[-1] in _PROJECTIONS else math.prod(own[:-1])
    return (normal / math.sqrt(inputs)).astype(np.float32)
  deviation = _DEVIATIONS.get(name, _ELSEWHERE)
  return np.asarray(_MEANS.get(name, 0.0) + deviation * normal, np.float32)


def redrawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """All leaves of a network by path."""
  return {path: redraw(path, shape) for path, shape in shapes.items()}


def probe(path: str, shape: tuple[int, ...]) -> np.ndarray:
  """Probe for the gradient of the leaf at a path, float64."""
  return redraw(f'probe/{path}', shape).astype(np.float64)
