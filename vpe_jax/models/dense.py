"""flax's dense layers with the products of ops.matmul, for both layouts of models.kernel_layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from vpe_jax.contracts import Array
from vpe_jax.models import kernel_layout
from vpe_jax.ops.matmul import dot_general


class Dense(nn.Dense):
  """flax.linen.Dense, whose kernel may be transposed (kernel_layout)."""

  dot_general: Any = dot_general

  def __call__(self, inputs: Array) -> Array:
    """Maps [..., K] to [..., features]."""
    if self.has_variable('params', kernel_layout.TRANSPOSED):
      return _transposed(self, inputs, 1)
    return super().__call__(inputs)


class DenseGeneral(nn.DenseGeneral):
  """flax.linen.DenseGeneral over the last axes, whose kernel may be transposed (kernel_layout)."""

  dot_general: Any = dot_general

  def __call__(self, inputs: Array) -> Array:
    """Maps [..., *K] to [..., *features]; sums over the axes K."""
    if self.has_variable('params', kernel_layout.TRANSPOSED):
      return _transposed(self, inputs, len(self.axis) if isinstance(self.axis, Sequence) else 1)
    return super().__call__(inputs)


def _transposed(layer: Dense | DenseGeneral, x: Array, count: int) -> Array:
  """Output of a layer with a transposed kernel; sums over the last `count` axes of `x`."""
  kernel = layer.get_variable('params', kernel_layout.TRANSPOSED)
  bias = layer.get_variable('params', 'bias') if layer.use_bias else None
  return kernel_layout.dense(x, kernel, bias, count, layer.dtype)
