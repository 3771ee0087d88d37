"""Dtypes in which weights are stored and loaded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Params, UserError

FLOATS = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(jnp.bfloat16),
  'float16': np.dtype(np.float16),
}


def parse(name: str) -> np.dtype:
  """Converts the name of a dtype to the numpy dtype.

  Raises:
    UserError: the name is not a key of FLOATS.
  """
  if name not in FLOATS:
    raise UserError(f"unknown dtype '{name}' of weights: choose one of {', '.join(FLOATS)}")
  return FLOATS[name]


def is_float(leaf: Any) -> bool:
  """Whether an array (or shape) has a floating-point dtype, bfloat16 included."""
  return jnp.issubdtype(leaf.dtype, np.floating)


def cast(leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Rounds or widens a float array to `dtype`; returns any other array unchanged."""
  return leaf.astype(dtype, copy=False) if is_float(leaf) else leaf


def cast_shapes(tree: Params, dtype: np.dtype) -> Params:
  """Applies `cast` to a tree of `jax.ShapeDtypeStruct`; the result has no shardings."""
  shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype if is_float(leaf) else leaf.dtype)
  return jax.tree.map(shape, tree)
