"""Dense layers over ops.matmul: flax's own, whose kernels may also lie output by output.

Kernels are [in, out] in training and in checkpoints. Decoding on a CPU is faster with [out, in]:
`turned` makes such parameters, and a layer that finds them uses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from vpe_jax.contracts import Array, Params
from vpe_jax.ops.matmul import dot_general, turned_product

TURNED = 'turned'  # the kernel's name where its outputs come first
_TWO_AXES = 'o'  # the layer that sums over two axes, heads and their width


class Dense(nn.Dense):
  """flax's layer; see the module."""

  dot_general: Any = dot_general

  def __call__(self, inputs: Array) -> Array:
    """[..., features] of [..., K]."""
    if self.has_variable('params', TURNED):
      return _turned_layer(self, inputs, 1)
    return super().__call__(inputs)


class DenseGeneral(nn.DenseGeneral):
  """flax's layer over the last axes; see the module."""

  dot_general: Any = dot_general

  def __call__(self, inputs: Array) -> Array:
    """[..., *features] of [..., *K]."""
    if self.has_variable('params', TURNED):
      return _turned_layer(self, inputs, len(self.axis) if isinstance(self.axis, Sequence) else 1)
    return super().__call__(inputs)


def _turned_layer(layer: Dense | DenseGeneral, x: Array, count: int) -> Array:
  """The layer's output by its turned kernel; the last `count` axes of `x` are summed over."""
  kernel = layer.get_variable('params', TURNED)
  bias = layer.get_variable('params', 'bias') if layer.use_bias else None
  x, kernel, bias = promote_dtype(x, kernel, bias, dtype=layer.dtype)
  rows, features = x.shape[: x.ndim - count], kernel.shape[: kernel.ndim - count]
  inner = math.prod(kernel.shape[kernel.ndim - count :])
  out = turned_product(x.reshape(*rows, inner), kernel.reshape(-1, inner))
  out = out.reshape(*rows, *features)
  return out if bias is None else out + bias


def columns(params: Params, x: Array, first: int = 0, last: int | None = None) -> Array:
  """Rows [..., K] with some columns of a kernel [K, N], turned or not: [..., last - first]."""
  if TURNED in params:
    return turned_product(x, params[TURNED][first:last].astype(x.dtype))
  return jnp.einsum('...K,KN->...N', x, params['kernel'][:, first:last].astype(x.dtype))


def turned(params: Params) -> Params:
  """The parameters of a model whose layers were taken apart, for decoding on a CPU.

  The kernels of the layers, and that of a `head` of logits, lie output by output.
  """

  def walk(tree: Any, name: str, in_layers: bool) -> Any:
    if isinstance(tree, tuple):
      return tuple(walk(layer, name, True) for layer in tree)
    if not isinstance(tree, Mapping):
      return tree
    found = {key: walk(value, key, in_layers) for key, value in tree.items()}
    if 'kernel' in tree and (in_layers or name == 'head'):
      found[TURNED] = _outputs_first(found.pop('kernel'), 2 if name == _TWO_AXES else 1)
    return found

  return walk(params, '', False)


def _outputs_first(kernel: Array, count: int) -> Array:
  """A kernel with its first `count` axes last."""
  numpy = np if isinstance(kernel, np.ndarray) else jnp
  return numpy.moveaxis(kernel, range(count), range(-count, 0))
