"""Randomness as a function of names: nothing is carried, nothing is split along the way.

What belongs to an example is f(seed, stream, example index), so that it doesn't depend on the
number of hosts, microbatches or packed rows; the rest is f(seed, stream).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import jax

from vpe_jax.contracts import Array, UserError

SEEDS = 2**31  # the seeds are 0 to SEEDS - 1: from 2**32 on, keys of smaller seeds come again


def run_key(seed: int) -> Array:
  """The key of a whole run.

  Raises:
    UserError: see `check_seed`.
  """
  check_seed(seed)
  return jax.random.key(seed)


def check_seed(seed: int) -> None:
  """Refuses numbers that are no seeds, for front doors before they start.

  Raises:
    UserError: the seed is negative or too large.
  """
  if not 0 <= seed < SEEDS:
    raise UserError(f'seed is {seed}: choose one from 0 to {SEEDS - 1}')


def stream(key: Array, name: str) -> Array:
  """The key of one named use of randomness, such as "noise"."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def example_keys(key: Array, name: str, example: Array) -> Array:
  """One key for each example index [B]: keys [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(stream(key, name), example)


def per_example(draw: Callable[[Array], Array], key: Array, name: str, example: Array) -> Array:
  """Calls `draw(key)` once for each example index [B] and stacks the results: [B, ...]."""
  return jax.vmap(draw)(example_keys(key, name, example))
