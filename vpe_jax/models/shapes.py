"""Shapes of a network's parameters, without computing them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from vpe_jax.contracts import Params


def parameter_shapes(network: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Params:
  """Parameters of a module as a tree of `jax.ShapeDtypeStruct`.

  Args:
    network: the module. Equal modules are traced once, because many layers take seconds to trace.
    *inputs: shapes of the arguments of `network.__call__`.
  """
  return jax.tree.map(lambda leaf: leaf, _shapes(network, inputs))  # a copy for the caller


@functools.lru_cache(maxsize=64)
def _shapes(network: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> Params:
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(network.init, key, *inputs)['params']
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def images(size: int, count: int = 1) -> jax.ShapeDtypeStruct:
  """Square images [count, size, size, 3] float32, an argument of `parameter_shapes`."""
  return jax.ShapeDtypeStruct((count, size, size, 3), 'float32')
