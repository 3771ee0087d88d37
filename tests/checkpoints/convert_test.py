"""Tests of conversion: all keys, shapes and dtypes are checked before tensors are read."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax import sharding
from vpe_jax.checkpoints import convert, sources
from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import UserError
from vpe_jax.sharding import leaves_by_path

TABLE = Table(
  name='test',
  rows=(
    Row('layers.{n}.qkv.weight', ('layers/q', 'layers/k'), '(N H) D -> D N H'),
    Row('norm.weight', 'norm/scale'),
  ),
  ignored=((r'.*position_ids', 'a buffer'),),
  absent=((r'codes', 'the published network has no codes'),),
  ties=(('head.weight', 'norm.weight'),),
  prefixes=('model.',),
)


@dataclasses.dataclass
class FakeTensor:
  """A tensor in memory that counts its reads."""

  value: np.ndarray
  reads: int = 0

  @property
  def shape(self):
    return self.value.shape

  @property
  def dtype(self):
    return self.value.dtype

  def read(self):
    self.reads += 1
    return self.value


def _source(prefix: str = '') -> dict[str, FakeTensor]:
  rng = np.random.default_rng(0)
  tensors = {
    f'layers.{n}.qkv.weight': rng.standard_normal((8, 5)).astype(np.float32) for n in range(3)
  }
  tensors['norm.weight'] = rng.standard_normal(5).astype(np.float32)
  tensors['text.position_ids'] = np.arange(4)
  return {prefix + key: FakeTensor(value) for key, value in tensors.items()}


def _abstract():
  shapes = {'layers': {'q': (3, 5, 3, 2), 'k': (3, 5, 1, 2)}, 'norm': {'scale': (5,)}}
  shapes['codes'] = (7, 5)
  leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def _import(tensors, abstract=None):
  abstract = abstract or _abstract()
  tensor_map = convert.match_tensors(tensors, (TABLE,), abstract)
  return tensor_map, convert.tree(convert.load(tensors, tensor_map, abstract))


@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_every_tensor_is_used_or_ignored(prefix):
  tensors = _source(prefix)
  tensor_map, params = _import(tensors)
  assert tensor_map.ignored == {f'{prefix}text.position_ids': 'a buffer'}
  assert tensor_map.absent == {'codes': 'the published network has no codes'}
  assert tensor_map.destinations.keys() == tensors.keys() - tensor_map.ignored.keys()
  assert leaves_by_path(params).keys() == {'layers/q', 'layers/k', 'norm/scale'}
  second = tensors[f'{prefix}layers.2.qkv.weight'].value
  np.testing.assert_array_equal(params['layers']['q'][2, :, 1, 0], second[2])
  np.testing.assert_array_equal(params['layers']['k'][2, :, 0, 1], second[7])


def test_bfloat16_is_cast_to_float32_exactly():
  tensors = _source()
  for tensor in tensors.values():
    if tensor.value.dtype == np.float32:
      tensor.value = tensor.value.astype(jnp.bfloat16)
  params = _import(tensors)[1]
  assert params['norm']['scale'].dtype == jnp.float32
  expected = tensors['norm.weight'].value.astype(np.float32)
  np.testing.assert_array_equal(params['norm']['scale'], expected)


def test_leaves_are_loaded_with_their_shardings():
  mesh = sharding.make_mesh(MeshConfig())
  table = ((r'layers/[qk]', ('layers', 'embed', 'heads', 'head')), (r'norm/scale', ('embed',)))
  shapes = {'layers': {'q': (3, 16, 3, 2), 'k': (3, 16, 1, 2)}, 'norm': {'scale': (16,)}}
  leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  abstract = jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))
  shardings = sharding.param_shardings(abstract, table, mesh, 'fsdp')
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    abstract,
    shardings,
  )
  rng = np.random.default_rng(0)
  tensors = {f'layers.{n}.qkv.weight': FakeTensor(rng.standard_normal((8, 16))) for n in range(3)}
  tensors['norm.weight'] = FakeTensor(rng.standard_normal(16))
  for tensor in tensors.values():
    tensor.value = tensor.value.astype(np.float32)
  params = _import(tensors, abstract)[1]
  q = params['layers']['q']
  assert q.sharding == abstract['layers']['q'].sharding
  assert q.addressable_shards[0].data.size == q.size // 8
  for n in range(3):
    kernel = tensors[f'layers.{n}.qkv.weight'].value[:6]
    np.testing.assert_array_equal(q[n], kernel.T.reshape(16, 3, 2))


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_values_that_are_not_finite_are_named_unless_allowed(value):
  tensors = _source()
  key = next(iter(_import(tensors)[0].destinations))
  values = np.array(tensors[key].read())
  values.flat[0] = value
  tensors[key] = FakeTensor(values)
  with pytest.raises(UserError, match=f"NaN or infinite: 1 of '{key}': .*--allow_nonfinite"):
    _import(tensors)
  abstract = _abstract()
  tensor_map = convert.match_tensors(tensors, (TABLE,), abstract)
  leaves = convert.load(tensors, tensor_map, abstract, allow_nonfinite=True)
  assert sum(int((~np.isfinite(leaf)).sum()) for leaf in leaves.values()) == 1


def test_a_value_beyond_the_dtype_is_not_imported_as_infinity():
  tensors = _source()
  key = next(iter(_import(tensors)[0].destinations))
  tensors[key] = FakeTensor(np.full_like(tensors[key].read(), 1e30))
  half = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float16)
  with pytest.raises(UserError, match=f"range of the dtype: 40 of '{key}': .*float32") as error:
    _import(tensors, jax.tree.map(half, _abstract()))
  assert 'allow_nonfinite' not in str(error.value)


def _error(tensors, abstract=None) -> str:
  """The one-line error of an import, which must not read large tensors."""
  with pytest.raises(UserError) as error:
    _import(tensors, abstract)
  assert '\n' not in str(error.value)
  assert all(tensor.reads == 0 for key, tensor in tensors.items() if 'layers' in key)
  return str(error.value)


def test_error_lists_missing_and_unexpected_keys():
  tensors = _source()
  del tensors['layers.1.qkv.weight']
  tensors['layers.3.qkv.weight'] = tensors['layers.0.qkv.weight']
  tensors['unexpected'] = FakeTensor(np.zeros(2, np.float32))
  error = _error(tensors)
  for message in (
    "'layers.1.qkv.weight' is missing",
    "'layers.3.qkv.weight' has no parameter",
    "'unexpected' has no parameter",
  ):
    assert message in error


def test_error_names_wrong_shapes_and_dtypes():
  tensors = _source()
  tensors['layers.0.qkv.weight'].value = np.zeros((9, 5), np.float32)
  tensors['norm.weight'].value = np.zeros(5, np.int32)
  error = _error(tensors)
  assert re.search(r"'layers.0.qkv.weight' has the wrong shape: .*\[9, 5\]", error)
  assert "'norm.weight' is int32" in error


def test_error_names_a_parameter_without_a_tensor():
  abstract = _abstract() | {'new': jax.ShapeDtypeStruct((2,), jnp.float32)}
  assert "no tensor fills our 'new'" in _error(_source(), abstract)


def test_long_lists_of_differences_are_truncated():
  error = _error({f'x.{n}': FakeTensor(np.zeros(1, np.float32)) for n in range(20)})
  assert error.endswith('and 18 more')


def test_tied_tensors_must_be_equal():
  tensors = _source()
  tensors['head.weight'] = FakeTensor(tensors['norm.weight'].value.copy())
  tensor_map, _ = _import(tensors)
  assert tensor_map.ignored['head.weight'] == 'the same tensor as norm.weight'
  tensors = _source()
  tensors['head.weight'] = FakeTensor(tensors['norm.weight'].value + 1)
  assert 'should be one tensor' in _error(tensors)


def _all_params(tensors):
  return _import(tensors)[1] | {'codes': jnp.zeros((7, 5))}


@pytest.mark.parametrize('shard', [10**9, 200])
def test_export_equals_the_import(tmp_path, shard):
  tensors = _source()
  config = {'width': 5}
  folder = tmp_path / 'out'
  keys = convert.export(_all_params(tensors), TABLE, folder, config, {}, max_file_size=shard)
  assert keys == sorted(tensors.keys() - {'text.position_ids'})
  source = sources.open_source(str(folder))
  assert source.config == config and source.tensors.keys() == set(keys)
  for key in keys:
    np.testing.assert_array_equal(source.tensors[key].read(), tensors[key].value)
  index = folder / 'model.safetensors.index.json'
  assert index.exists() == (shard == 200)
  if index.exists():
    assert json.loads(index.read_text())['metadata']['total_size'] == 4 * (3 * 40 + 5)
    assert len(list(folder.glob('*-of-00003.safetensors'))) == 3
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_a_value_beyond_the_dtype_is_not_exported_as_infinity(tmp_path):
  params = _all_params(_source())
  params['norm']['scale'] = jnp.array([1e30, jnp.nan, 0, 0, 0])
  with pytest.raises(UserError, match="1 values of 'norm.weight' .* float16: .*float32"):
    convert.export(params, TABLE, tmp_path / 'out', {}, {}, dtype='float16')
  assert not list(tmp_path.iterdir())
  convert.export(params, TABLE, tmp_path / 'out', {}, {}, dtype='bfloat16')
  exported = sources.open_source(str(tmp_path / 'out')).tensors['norm.weight'].read()
  assert np.isfinite(exported).tolist() == [True, False, True, True, True]


def test_export_overwrites_nothing_and_is_atomic(tmp_path, monkeypatch):
  params = _all_params(_source())
  (tmp_path / 'existing').mkdir()
  with pytest.raises(UserError, match='exists'):
    convert.export(params, TABLE, tmp_path / 'existing', {}, {})
  with pytest.raises(UserError, match="no tensor for 'extra'"):
    convert.export(params | {'extra': jnp.zeros(1)}, TABLE, tmp_path / 'out', {}, {})

  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  (tmp_path / 'out.unfinished').mkdir()  # not ours
  monkeypatch.setattr(convert.safetensors.numpy, 'save_file', full)
  with pytest.raises(UserError, match='No space left'):
    convert.export(params, TABLE, tmp_path / 'out', {}, {})
  assert {path.name for path in tmp_path.iterdir()} == {'existing', 'out.unfinished'}


def test_a_full_disk_that_safetensors_reports_is_one_line(tmp_path, monkeypatch):
  def full(*_, **__):
    raise convert.safetensors.SafetensorError(
      'Error while serializing: I/O error: No space left on device (os error 28)'
    )

  monkeypatch.setattr(convert.safetensors.numpy, 'save_file', full)
  with pytest.raises(UserError, match='No space left on device; free some space'):
    convert.export(_all_params(_source()), TABLE, tmp_path / 'out', {}, {})
  assert not list(tmp_path.iterdir())


def test_partially_imported_layout_is_not_exported(tmp_path):
  table = Table('slices', (Row('conv.weight', 'conv', 'O I T -> I O', last='T'),))
  with pytest.raises(UserError, match='import only'):
    convert.export({'conv': jnp.zeros((2, 3))}, table, tmp_path / 'out', {}, {})
