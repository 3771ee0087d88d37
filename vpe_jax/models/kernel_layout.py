"""The layout of dense kernels: [in, out] in training and checkpoints, [out, in] to decode on a CPU.

For a few vectors, as in decoding, a CPU is fastest with the second layout (matmul_transposed of
vpe_jax.ops.matmul). `for_decoding` converts parameters to it, and renames converted kernels to
TRANSPOSED. The layers of models.dense, and `columns` below, accept both layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from vpe_jax.contracts import Array, Params
from vpe_jax.ops.matmul import matmul_transposed

TRANSPOSED = 'transposed'  # name of a kernel whose output axes come first
_TWO_AXES = 'o'  # name of the layer that sums over two input axes: heads and head width


def for_decoding(params: Params, platform: str) -> Params:
  """Parameters of a model with unstacked layers, in the layout that decodes fastest.

  On a CPU, kernels of layers and of the output `head` become [out, in]; elsewhere nothing changes.

  Args:
    params: parameters of the model.
    platform: platform of the devices, as `jax.default_backend` names it.
  """

  def walk(tree: Any, name: str, in_layers: bool) -> Any:
    if isinstance(tree, tuple):
      return tuple(walk(layer, name, True) for layer in tree)
    if not isinstance(tree, Mapping):
      return tree
    leaves = {key: walk(value, key, in_layers) for key, value in tree.items()}
    if 'kernel' in tree and (in_layers or name == 'head'):
      leaves[TRANSPOSED] = _outputs_first(leaves.pop('kernel'), 2 if name == _TWO_AXES else 1)
    return leaves

  return walk(params, '', False) if platform == 'cpu' else params


def dense(x: Array, kernel: Array, bias: Array | None, count: int, dtype: Any) -> Array:
  """Output [..., *features] of a dense layer whose kernel is TRANSPOSED.

  Args:
    x: [..., *inputs].
    kernel: [*features, *inputs].
    bias: [*features], or None.
    count: number of axes in `inputs`, which are summed over.
    dtype: compute dtype; None: the common dtype of the operands.
  """
  x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
  batch, features = x.shape[: x.ndim - count], kernel.shape[: kernel.ndim - count]
  inner = math.prod(kernel.shape[kernel.ndim - count :])
  out = matmul_transposed(x.reshape(*batch, inner), kernel.reshape(-1, inner))
  out = out.reshape(*batch, *features)
  return out if bias is None else out + bias


def columns(params: Params, x: Array, first: int = 0, last: int | None = None) -> Array:
  """Vectors [..., K] times columns of a kernel [K, N] in either layout: [..., last - first]."""
  if TRANSPOSED in params:
    return matmul_transposed(x, params[TRANSPOSED][first:last].astype(x.dtype))
  return jnp.einsum('...K,KN->...N', x, params['kernel'][:, first:last].astype(x.dtype))


def _outputs_first(kernel: Array, count: int) -> Array:
  """Moves the first `count` axes of a kernel, the inputs, to the end."""
  numpy = np if isinstance(kernel, np.ndarray) else jnp
  return numpy.moveaxis(kernel, range(count), range(-count, 0))
