"""A checksum per array that doesn't depend on the array's sharding.

Each element's bits, as an unsigned integer, are multiplied by an odd hash of the element's position
and summed modulo 2^32. Integer sums don't depend on their order, so every sharding gives the same
number. Because the factor is odd, one flipped bit always changes the sum: a difference of 2^k times
an odd number is no multiple of 2^32 for k < 32.
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

_MAX_GROUP = 8  # maximum number of arrays that one kernel sums; bounds what it reads at once


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
  """Computes the checksum of each array in one compiled call.

  Args:
    leaves: name -> array (JAX or numpy) of an integer, boolean or floating dtype. Without
      jax_enable_x64, JAX first narrows a numpy array of an 8-byte dtype to 4 bytes.

  Returns:
    name -> checksum in [0, 2^32).
  """
  if not leaves:
    return {}
  groups = _groups(leaves)
  arrays = [[leaves[name] for name in group] for group in groups]
  sums = np.asarray(_compiled(_output_sharding(leaves))(arrays))
  names = [name for group in groups for name in group]
  return {name: int(value) for name, value in zip(names, sums, strict=True)}


def _groups(leaves: Mapping[str, Any]) -> list[list[str]]:
  """Groups names of arrays of equal shape, dtype and sharding, which one reduction can sum.

  A parameter usually shares a group with its two optimizer moments and its EMA, so one kernel
  replaces four.
  """
  by_kind: dict[Any, list[list[str]]] = {}
  for name in sorted(leaves):
    leaf = leaves[name]
    key = (leaf.shape, str(leaf.dtype), getattr(leaf, 'sharding', None))
    groups = by_kind.setdefault(key, [[]])
    if len(groups[-1]) == _MAX_GROUP:
      groups.append([])
    groups[-1].append(name)
  return [group for groups in by_kind.values() for group in groups]


def _output_sharding(leaves: Mapping[str, Any]) -> NamedSharding | None:
  """Sharding of the sums: replicated, so that every process can read them; None without a mesh."""
  for leaf in leaves.values():
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(sharding, NamedSharding):
      return NamedSharding(sharding.mesh, P())
  return None


@functools.cache
def _compiled(sharding: NamedSharding | None) -> Any:
  return jax.jit(_sums, out_shardings=sharding)


def _sums(groups: list[list[Array]]) -> Array:
  return jnp.stack([total for group in groups for total in _group_sums(group)])


def _group_sums(group: list[Array]) -> tuple[Array, ...]:
  factor = _position_hash(group[0].shape)
  terms = []
  for leaf in group:
    bits = _bits(leaf)
    # The bitcast of an 8-byte element gives two words in an additional last axis.
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
  """An odd uint32 for each row-major position, independent of the sharding."""
  position = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
  # lowbias32, a bijective hash (Chris Wellons, hash-prospector); the last line sets the lowest bit.
  position = (position ^ (position >> 16)) * np.uint32(0x7FEB352D)
  position = (position ^ (position >> 15)) * np.uint32(0x846CA68B)
  return (position ^ (position >> 16)) | np.uint32(1)
