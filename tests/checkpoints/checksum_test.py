"""Tests of the per-array checksum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax import sharding
from vpe_jax.checkpoints.checksum import checksums
from vpe_jax.config import MeshConfig


def _reference(array: np.ndarray) -> int:
  """The definition of the checksum in Python integers."""
  words = {1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32)
  total = 0
  for position, word in enumerate(array.reshape(-1).view(words).tolist()):
    factor = ((position ^ (position >> 16)) * 0x7FEB352D) % 2**32
    factor = ((factor ^ (factor >> 15)) * 0x846CA68B) % 2**32
    total += word * ((factor ^ (factor >> 16)) | 1)
  return total % 2**32


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint8', 'int8', 'bool', 'float64']
)
def test_matches_its_definition(dtype):
  values = np.random.default_rng(0).normal(size=(3, 5, 7)) * 9
  # jnp, not np: numpy doesn't know bfloat16 by name.
  array = values.astype(jnp.dtype(dtype))
  with jax.enable_x64(dtype == 'float64'):
    assert checksums({'x': array}) == {'x': _reference(array)}


def test_groups_of_equal_arrays_and_scalars():
  rng = np.random.default_rng(1)
  leaves = {f'a{i}': rng.normal(size=(4, 6)).astype(np.float32) for i in range(19)}
  leaves |= {'scalar': np.float32(2.5).reshape(()), 'empty': np.zeros((0, 3), np.float32)}
  assert checksums(leaves) == {name: _reference(leaf) for name, leaf in leaves.items()}
  assert checksums({}) == {}


def test_does_not_depend_on_the_sharding():
  array = np.random.default_rng(2).normal(size=(16, 24, 8)).astype(np.float32)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
  expected = _reference(array)
  specs = (jax.P(), jax.P('fsdp'), jax.P(None, ('data', 'fsdp')), jax.P('data', None, 'fsdp'))
  leaves = {str(spec): jax.device_put(array, jax.NamedSharding(mesh, spec)) for spec in specs}
  assert set(checksums(leaves).values()) == {expected}
  assert set(checksums({'one': jnp.asarray(array)}).values()) == {expected}
  with jax.set_mesh(mesh):
    assert set(checksums(leaves).values()) == {expected}


def test_changes_with_every_single_bit():
  array = np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)
  intact = checksums({'x': array})['x']
  flipped = {}
  for position in range(array.size):
    for bit in range(32):
      changed = array.copy()
      changed.view(np.uint32).reshape(-1)[position] ^= np.uint32(1 << bit)
      flipped[f'{position}.{bit}'] = changed
  assert intact not in checksums(flipped).values()


def test_changes_with_the_order_of_elements():
  array = np.arange(12, dtype=np.float32)
  reversed_array = array[::-1].copy()
  sums = checksums({'x': array, 'y': reversed_array, 'z': array.reshape(3, 4)})
  assert sums['x'] != sums['y']
  assert sums['x'] == sums['z']
