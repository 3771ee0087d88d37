"""Tests of tables that map published tensors to our parameters."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.checkpoints import table as tables
from vpe_jax.checkpoints.table import Row, Table

FUSED = Row('block.{n}.qkv.weight', ('layers/q', 'layers/k', 'layers/v'), '(N H) D -> D N H')
TABLE = Table(
  name='test',
  rows=(
    FUSED,
    Row('stem.weight', 'stem/kernel', 'D C p q -> (p q C) D'),
    Row('conv.{n}.{m}.weight', 'conv_{n}/{m}', 'O I T h w -> h w I O', last='T'),
    Row('scale', 'scale', '1 ->'),
  ),
)


def test_destination_has_targets_and_index():
  destination = tables.destination(TABLE, 'block.12.qkv.weight')
  assert destination.targets == ('layers/q', 'layers/k', 'layers/v') and destination.index == 12
  destination = tables.destination(TABLE, 'conv.3.1.weight')
  assert destination.targets == ('conv_3/1',) and destination.index is None
  assert tables.destination(TABLE, 'block.x.qkv.weight') is None
  assert tables.destination(TABLE, 'block.1.qkv.weight2') is None


def test_table_with_two_rows_for_a_key_is_refused():
  ambiguous = Table('test', (Row('a.{n}', 'x'), Row('a.{m}', 'y')))
  with pytest.raises(ValueError, match='two rows'):
    tables.destination(ambiguous, 'a.1')


def test_keys_enumerate_stacked_layers_and_numbered_paths():
  leaves = {'layers/q': (2, 6, 3, 2), 'conv_0/1': (3, 3, 1, 1), 'conv_7/0': (3, 3, 1, 1)}
  keys = {
    key: destination.index for row in TABLE.rows for key, destination in tables.keys(row, leaves)
  }
  assert keys == {
    'block.0.qkv.weight': 0,
    'block.1.qkv.weight': 1,
    'conv.0.1.weight': None,
    'conv.7.0.weight': None,
  }


def test_fused_qkv_is_split_and_concatenated():
  tensor = np.random.default_rng(0).standard_normal((6 + 2 + 2, 5))
  destination = tables.destination(TABLE, 'block.0.qkv.weight')
  shapes = [(5, 3, 2), (5, 1, 2), (5, 1, 2)]
  assert tables.misfit(destination, tensor.shape, shapes) == ''
  q, k, v = tables.forward(destination, tensor, shapes)
  np.testing.assert_array_equal(q[:, 1, 0], tensor[2])
  np.testing.assert_array_equal(k[:, 0, 1], tensor[7])
  np.testing.assert_array_equal(v[:, 0], tensor[8:].T)
  np.testing.assert_array_equal(tables.backward(destination, [q, k, v], {}), tensor)


def test_export_takes_sizes_of_merged_axes():
  tensor = np.random.default_rng(0).standard_normal((4, 3, 2, 2))
  destination = tables.destination(TABLE, 'stem.weight')
  (kernel,) = tables.forward(destination, tensor, [(12, 4)])
  np.testing.assert_array_equal(kernel[3 * 1 + 2], tensor[:, 2, 0, 1])
  np.testing.assert_array_equal(
    tables.backward(destination, [kernel], {'p': 2, 'q': 2, 'x': 9}), tensor
  )


def test_last_index_of_an_axis_is_imported_and_not_exported():
  tensor = np.random.default_rng(0).standard_normal((4, 3, 3, 2, 2))
  destination = tables.destination(TABLE, 'conv.0.0.weight')
  assert tables.misfit(destination, tensor.shape, [(2, 2, 3, 4)]) == ''
  (kernel,) = tables.forward(destination, tensor, [(2, 2, 3, 4)])
  np.testing.assert_array_equal(kernel[1, 0, 2, 3], tensor[3, 2, -1, 1, 0])
  with pytest.raises(ValueError, match="can't be exported"):
    tables.backward(destination, [kernel], {})


def test_vector_of_one_becomes_a_scalar():
  destination = tables.destination(TABLE, 'scale')
  (scalar,) = tables.forward(destination, np.array([2.5]), [()])
  assert scalar.shape == () and tables.backward(destination, [scalar], {}).shape == (1,)


@pytest.mark.parametrize(
  'key, source, shapes',
  [
    ('block.0.qkv.weight', (9, 5), [(5, 3, 2), (5, 1, 2), (5, 1, 2)]),
    ('block.0.qkv.weight', (10, 4), [(5, 3, 2), (5, 1, 2), (5, 1, 2)]),
    ('block.0.qkv.weight', (10,), [(5, 3, 2), (5, 1, 2), (5, 1, 2)]),
    ('stem.weight', (4, 3, 2, 2), [(12, 5)]),
    ('stem.weight', (4, 3, 2, 3), [(12, 4)]),
    ('stem.weight', (4, 12), [(12, 4)]),
    ('conv.0.0.weight', (4, 3, 2, 2), [(2, 2, 3, 4)]),
    ('conv.0.0.weight', (4, 3, 3, 2, 1), [(2, 2, 3, 4)]),
    ('scale', (2,), [()]),
  ],
)
def test_misfit_detects_wrong_shapes(key, source, shapes):
  destination = tables.destination(TABLE, key)
  assert tables.misfit(destination, source, shapes)
  with pytest.raises(ValueError):
    tables.forward(destination, np.zeros(source), shapes)
