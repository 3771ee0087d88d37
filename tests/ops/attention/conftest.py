"""Attention calls with the masks of masks.py."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention.masks import BUILDERS, LENGTH, SIZED, Mask
from vpe_jax.ops.attention import reference


@dataclasses.dataclass(frozen=True)
class Case:
  """Arrays of one call: q, k, v, the mask, and gradients of the output and the log-sum-exp."""

  inputs: tuple[jax.Array, jax.Array, jax.Array]
  mask: Mask
  gradients: tuple[jax.Array, jax.Array]


def case(mask: Mask, dtype: jnp.dtype = jnp.float32, heads: tuple[int, int, int] = (4, 2, 24)):
  """Random arrays for a mask, with `heads` = (N, K, H)."""
  query, key = mask
  (N, K, H), (B, L), S = heads, query.order.shape, key.order.shape[1]
  keys = jax.random.split(jax.random.key(0), 5)
  normal = lambda key, *shape: jax.random.normal(key, shape)
  q, k, v = normal(keys[0], B, L, N, H), normal(keys[1], B, S, K, H), normal(keys[2], B, S, K, H)
  inputs = tuple((2 * x).astype(dtype) for x in (q, k, v))
  gradients = (normal(keys[3], B, L, N, H).astype(dtype), normal(keys[4], B, L, N))
  return Case(inputs, mask, gradients)


def near_reference(run: Callable, mask: Mask, dtype: jnp.dtype) -> None:
  """Asserts that an implementation agrees with the definition, up to the rounding of a device."""
  operands = case(mask, dtype, heads=(4, 2, 72))
  ours, theirs = differentiated(run)(operands), differentiated(reference.attention)(operands)
  for a, b in zip(ours, theirs, strict=True):
    a, b = (np.where(np.isneginf(x), 0, np.asarray(x, np.float32)) for x in (a, b))
    scale = max(1.0, np.abs(b).max())
    np.testing.assert_allclose(a / scale, b / scale, atol=5e-2 if dtype == jnp.bfloat16 else 5e-3)


def differentiated(run: Callable) -> Callable:
  """`run(q, k, v, query, key)` -> output, log-sum-exp, and gradients of q, k and v."""

  def both(x: Case) -> tuple:
    out, pull = jax.vjp(lambda *inputs: run(*inputs, *x.mask), *x.inputs)
    return (*out, *pull(x.gradients))

  return jax.jit(both)


jax.tree_util.register_dataclass(Case)


@pytest.fixture(scope='session')
def masks() -> types.SimpleNamespace:
  """The builders of masks.py, masks of several blocks (`sized`), and functions that use them."""
  return types.SimpleNamespace(
    builders=BUILDERS,
    sized={name: BUILDERS[name](*sizes) for name, sizes in SIZED.items()},
    length=LENGTH,
    case=case,
    differentiated=differentiated,
    near_reference=near_reference,
    **BUILDERS,
  )
