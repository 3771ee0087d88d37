"""A checksum per array that doesn't depend on how the array is spread over devices.

The bits of each element, as an unsigned integer, times an odd hash of its position, summed modulo
2^32. Integer sums don't depend on their order, so any sharding gives the same number; and because
the factor is odd, one flipped bit always changes it (a difference of 2^k times an odd number is
no multiple of 2^32 for k < 32).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vpe_jax.contracts import Array

_LIMIT = 8  # arrays summed by one kernel: bounds what is read at once


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
  """The checksum of each array, in one compiled call.

  Args:
    leaves: name -> array (JAX or numpy) of any integer, boolean or floating dtype.

  Returns:
    name -> checksum in [0, 2^32).
  """
  if not leaves:
    return {}
  groups = _groups(leaves)
  ordered = [[leaves[name] for name in group] for group in groups]
  sums = np.asarray(_compiled(_target(leaves))(ordered))
  names = [name for group in groups for name in group]
  return {name: int(value) for name, value in zip(names, sums, strict=True)}


def _groups(leaves: Mapping[str, Any]) -> list[list[str]]:
  """Names of arrays that one reduction can sum: same shape, dtype and layout.

  A parameter, its moments and its average are such a group: a quarter of the kernels to compile.
  """
  alike: dict[Any, list[list[str]]] = {}
  for name in sorted(leaves):
    leaf = leaves[name]
    key = (leaf.shape, str(leaf.dtype), getattr(leaf, 'sharding', None))
    groups = alike.setdefault(key, [[]])
    if len(groups[-1]) == _LIMIT:
      groups.append([])
    groups[-1].append(name)
  return [group for groups in alike.values() for group in groups]


def _target(leaves: Mapping[str, Any]) -> NamedSharding | None:
  """Where the sums go: whole on every device, so that each process can read them."""
  for leaf in leaves.values():
    place = getattr(leaf, 'sharding', None)
    if isinstance(place, NamedSharding):
      return NamedSharding(place.mesh, P())
  return None


@functools.cache
def _compiled(target: NamedSharding | None) -> Any:
  return jax.jit(_sums, out_shardings=target)


def _sums(groups: list[list[Array]]) -> Array:
  return jnp.stack([total for group in groups for total in _group_sums(group)])


def _group_sums(group: list[Array]) -> tuple[Array, ...]:
  factor = _position_hash(group[0].shape)
  terms = []
  for leaf in group:
    bits = _bits(leaf)
    # An element of 8 bytes is two words, side by side in a last axis of their own.
    terms.append(bits * (factor if bits.shape == factor.shape else _position_hash(bits.shape)))
  zeros = (np.uint32(0),) * len(terms)
  axes = tuple(range(terms[0].ndim))
  return tuple(
    jax.lax.reduce(tuple(terms), zeros, lambda a, b: [x + y for x, y in zip(a, b)], axes)
  )


def _bits(leaf: Array) -> Array:
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  words = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)


def _position_hash(shape: tuple[int, ...]) -> Array:
  """An odd uint32 for each position in row-major order, the same on any layout."""
  place = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
  place = (place ^ (place >> 16)) * np.uint32(0x7FEB352D)
  place = (place ^ (place >> 15)) * np.uint32(0x846CA68B)
  return (place ^ (place >> 16)) | np.uint32(1)
