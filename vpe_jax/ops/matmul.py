"""Matrix products of dense layers, in the layouts that run fast forward and backward.

`dot_general` has a weight gradient that every backend runs at full speed; `matmul_transposed` is
for decoding, where a few vectors are multiplied by a large kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array

_MAX_VECTORS = 128  # with more vectors, `x @ kernel.T` is as fast on a CPU


def dot_general(
  x: Array,
  kernel: Array,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> Array:
  """`jax.lax.dot_general` for dense layers: trailing axes of `x` with leading axes of `kernel`.

  JAX's own derivative computes the transposed weight gradient, from a transposed copy of the
  output's gradient; on CPU that copy takes longer than the product. Here the gradient is
  `x.T @ gradient`, in the kernel's own layout.

  Raises:
    ValueError: other axes are contracted, or there are batch axes.
  """
  (ours, theirs), batch = dimension_numbers
  count = len(ours)
  trailing, leading = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
  if tuple(ours) != trailing or tuple(theirs) != leading or any(map(len, batch)):
    raise ValueError(f'not the product of a dense layer: {dimension_numbers}')
  batch, features = x.shape[: x.ndim - count], kernel.shape[count:]
  inner = math.prod(kernel.shape[:count])
  product = _product(precision, preferred_element_type)
  return product(x.reshape(*batch, inner), kernel.reshape(inner, -1)).reshape(*batch, *features)


def matmul_transposed(x: Array, kernel: Array) -> Array:
  """`x @ kernel.T`: vectors [..., K] times a kernel [N, K], the layout of embedding tables.

  On CPU, few vectors are fastest as `kernel @ x.T`. At the sizes of Qwen2.5-0.5B, 1 to 16 vectors
  take 0.6 to 0.8 of the time of a product with a kernel [K, N]; 2 or more take half the time of
  `x @ kernel.T`. Without the barriers, XLA would rewrite the product to that slower form.
  """
  many = lambda x, kernel: jnp.einsum('...K,NK->...N', x, kernel)
  if math.prod(x.shape[:-1]) > _MAX_VECTORS:
    return many(x, kernel)

  def few(x: Array, kernel: Array) -> Array:
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    out = jax.lax.optimization_barrier(kernel @ columns)
    return out.T.reshape(*x.shape[:-1], kernel.shape[0])

  return jax.lax.platform_dependent(x, kernel, cpu=few, default=many)


def _product(precision: Any, dtype: Any) -> Callable[[Array, Array], Array]:
  """The product of x [..., K] and a kernel [K, M], in `dtype` (None: as the operands)."""

  @jax.custom_vjp
  def product(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel, precision=precision, preferred_element_type=dtype)

  def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)

  def backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    to_x = jnp.einsum('...m,km->...k', gradient, kernel, precision=precision)
    count = math.prod(x.shape[:-1])
    to_kernel = jax.lax.dot_general(
      x.reshape(count, x.shape[-1]),
      gradient.reshape(count, gradient.shape[-1]),
      (((0,), (0,)), ((), ())),
      precision=precision,
    )
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)

  product.defvjp(forward, backward)
  return product
