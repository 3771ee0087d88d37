"""Parameters for golden numbers: each leaf is a function of its path and shape alone.

No leaf is zero or the identity, so leaves that are initialized at zero are tested as well. The
values depend neither on JAX nor on the order of a tree: code that renames or reorders leaves gets
the same arrays under the recorded paths.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping

import numpy as np

_STACKED = re.compile(r'(^|/)(layers|blocks)/|dual_path/encoder/')  # their first axis is the layer
_PROJECTIONS = ('q', 'k', 'v')  # kernels [in, heads, width]; other kernels have their outputs last
_MEANS = {'scale': 1.0, 'logit_scale': 2.3, 'logit_bias': -3.0}
_DEVIATIONS = {'bias': 0.05, 'codebook': 1.0}
_ELSEWHERE = 0.1  # standard deviation of scales, embedding tables, positions


def redraw(path: str, shape: tuple[int, ...]) -> np.ndarray:
  """The leaf at a path: float32 normal numbers; the name determines their scale.

  Kernels keep the variance of their inputs, scales have mean 1, codebooks have variance 1.

  Args:
    path: names joined by `/`.
    shape: of the leaf.
  """
  *parents, name = path.split('/')
  normal = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)
  if name == 'kernel':
    sizes = shape[1:] if _STACKED.search(path) else shape
    inputs = sizes[0] if parents[-1:] and parents[-1] in _PROJECTIONS else math.prod(sizes[:-1])
    return (normal / math.sqrt(inputs)).astype(np.float32)
  deviation = _DEVIATIONS.get(name, _ELSEWHERE)
  return np.asarray(_MEANS.get(name, 0.0) + deviation * normal, np.float32)


def redrawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """All leaves of a network by path."""
  return {path: redraw(path, shape) for path, shape in shapes.items()}


def probe(path: str, shape: tuple[int, ...]) -> np.ndarray:
  """Probe for the gradient of the leaf at a path, float64."""
  return redraw(f'probe/{path}', shape).astype(np.float64)
