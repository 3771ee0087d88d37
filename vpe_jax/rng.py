"""Random keys derived from names: no key is carried along or split.

The key of an example is f(seed, stream, example index), so it doesn't depend on the number of
hosts, microbatches or packed sequences. All other keys are f(seed, stream).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import jax

from vpe_jax.contracts import Array, UserError

SEEDS = 2**31  # valid seeds are 0 to SEEDS - 1; from 2**32 on, JAX's keys repeat


def run_key(seed: int) -> Array:
  """The root key of a run.

  Raises:
    UserError: see `check_seed`.
  """
  check_seed(seed)
  return jax.random.key(seed)


def abstract_key() -> jax.ShapeDtypeStruct:
  """The shape and dtype of a root key, for tracing: nothing runs on a device."""
  return jax.eval_shape(lambda: run_key(0))


def check_seed(seed: int) -> None:
  """Checks a seed, for front doors before they start.

  Raises:
    UserError: the seed is negative or too large.
  """
  if not 0 <= seed < SEEDS:
    raise UserError(f'seed is {seed}: choose one from 0 to {SEEDS - 1}')


def stream(key: Array, name: str) -> Array:
  """Derives the key of one use of randomness from its name, such as "noise"."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def example_keys(key: Array, name: str, example: Array) -> Array:
  """Derives one key per example index [B]: keys [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(stream(key, name), example)


def encoding_keys(key: Array, example: Array) -> Array:
  """The keys [B] of `System.encode` for example indices [B]."""
  return example_keys(key, 'encode', example)


def per_example(sample: Callable[[Array], Array], key: Array, name: str, example: Array) -> Array:
  """Vectorizes `sample(key)` over example indices [B]: results [B, ...]."""
  return jax.vmap(sample)(example_keys(key, name, example))
