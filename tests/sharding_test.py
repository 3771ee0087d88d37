"""Tests of the mesh, of parameter shardings and of batches on the mesh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from vpe_jax import sharding
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import UserError

TABLE = (
  (r'layers/(q|k|v)/kernel', ('layers', 'embed', 'heads', 'head')),
  (r'layers/norm', ('layers', 'embed')),
  (r'mlp/kernel', ('embed', 'mlp')),
  (r'vocabulary', ('vocab', 'embed')),
  (r'scale', (None,)),
)


def _mesh(**sizes) -> jax.sharding.Mesh:
  return sharding.make_mesh(MeshConfig(**sizes))


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _spec(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh, strategy: str = 'fsdp') -> P:
  (leaf_sharding,) = sharding.param_shardings(
    {path: _shape(*shape)}, TABLE, mesh, strategy
  ).values()
  return leaf_sharding.spec


class TestMakeMesh:
  def test_minus_one_takes_the_remaining_devices(self):
    mesh = _mesh(data=2, fsdp=-1)
    assert dict(mesh.shape) == {'data': 2, 'fsdp': 4, 'tensor': 1}
    assert set(mesh.axis_types) == {AxisType.Auto}

  def test_subset_of_devices(self):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
    assert mesh.shape['fsdp'] == 2

  @pytest.mark.parametrize(
    'sizes', [{'data': 3}, {'data': 3, 'fsdp': 1}, {'data': 16}, {'data': 1, 'fsdp': 4}]
  )
  def test_sizes_must_multiply_to_the_number_of_devices(self, sizes):
    with pytest.raises(UserError, match='does not fit 8 devices'):
      _mesh(**sizes)

  def test_at_most_one_size_is_minus_one(self):
    with pytest.raises(UserError, match='at most one is -1'):
      _mesh(data=-1, fsdp=-1)
    with pytest.raises(UserError, match='-1 or at least 1'):
      _mesh(data=0)

  @pytest.mark.parametrize('data', [1, 2])
  def test_gpu_hosts_need_no_data_axis(self, monkeypatch, data):
    gpu = {'platform': 'gpu', 'device_kind': 'NVIDIA H100'}
    devices = [types.SimpleNamespace(id=n, slice_index=n // 2, **gpu) for n in range(4)]
    monkeypatch.setattr(sharding, 'Mesh', lambda grid, *_, **__: grid)
    grid = sharding.make_mesh(MeshConfig(data=data), devices)
    assert grid.shape == (data, 4 // data, 1)
    assert [d.id for d in grid.flat] == [0, 1, 2, 3]

  def test_unknown_or_unsuitable_strategy_is_refused(self):
    with pytest.raises(UserError, match="did you mean 'fsdp'"):
      _mesh(strategy='fspd')
    with pytest.raises(UserError, match='strategy=fsdp_tensor'):
      _mesh(tensor=2)


class TestParamShardings:
  def test_width_is_sharded_first(self):
    mesh = _mesh()
    assert _spec('ar/layers/q/kernel', (4, 64, 8, 16), mesh) == P(None, 'fsdp')
    assert _spec('ar/mlp/kernel', (16, 4096), mesh) == P('fsdp')

  def test_fallback_is_the_largest_divisible_dimension(self):
    mesh = _mesh()
    assert _spec('ar/mlp/kernel', (12, 40), mesh) == P(None, 'fsdp')
    assert _spec('vocabulary', (160, 12), mesh) == P('fsdp')
    assert _spec('vocabulary', (13, 12), mesh) == P()

  def test_stacked_layers_are_never_sharded(self):
    assert _spec('ar/layers/norm', (8, 12), _mesh()) == P()

  def test_two_axes_shard_dimensions_that_one_axis_cannot(self):
    # 8 divides neither 12 nor 20, but 4 and 2 do; the same holds for 256, 1152 and 4304.
    assert _spec('mlp/kernel', (12, 20), _mesh()) == P()
    spec = _spec('mlp/kernel', (12, 20), _mesh(data=2, fsdp=4))
    assert spec == P('fsdp', 'data')
    assert _spec('mlp/kernel', (16, 20), _mesh(data=2, fsdp=4)) == P(('data', 'fsdp'))

  def test_tensor_axis(self):
    mesh = _mesh(fsdp=4, tensor=2, strategy='fsdp_tensor')
    q = _spec('ar/layers/q/kernel', (3, 64, 4, 16), mesh, 'fsdp_tensor')
    assert q == P(None, 'fsdp', 'tensor')
    # Two doesn't divide three heads: heads stay whole, the width is sharded over both axes.
    q = _spec('ar/layers/q/kernel', (3, 64, 3, 16), mesh, 'fsdp_tensor')
    assert q == P(None, ('fsdp', 'tensor'))
    assert _spec('vocabulary', (128, 64), mesh, 'fsdp_tensor') == P('tensor', 'fsdp')

  def test_state_and_parameters_share_one_table(self):
    params = {'ar': {'layers': {'q': {'kernel': _shape(4, 64, 8, 16)}}, 'scale': _shape(64)}}
    state = {
      'params': params,
      'opt_state': ({'mu': params, 'count': _shape()}, (), [params]),
      'ema': params,
    }
    shardings = sharding.leaves_by_path(sharding.param_shardings(state, TABLE, _mesh(), 'fsdp'))
    assert shardings['opt_state/0/mu/ar/layers/q/kernel'].spec == P(None, 'fsdp')
    assert shardings['opt_state/2/0/ar/scale'].spec == P('fsdp')
    assert shardings['opt_state/0/count'].spec == P()
    assert shardings['ema/ar/layers/q/kernel'] == shardings['params/ar/layers/q/kernel']

  def test_pattern_matches_whole_components_of_a_path(self):
    with pytest.raises(UserError, match="no row of logical_axes matches 'a/postscale'"):
      _spec('a/postscale', (8,), _mesh())

  def test_misfitting_table_row_is_refused(self):
    tree = {'scale': _shape(4, 4)}
    with pytest.raises(UserError, match=r"'scale' has shape \(4, 4\)"):
      sharding.param_shardings(tree, TABLE, _mesh(), 'fsdp')
    with pytest.raises(UserError, match="did you mean 'embed'"):
      sharding.param_shardings(tree, (('scale', ('embd', None)),), _mesh(), 'fsdp')

  def test_unnamed_dimensions_are_sharded_too(self):
    for table in ((), (('.*', ()),)):
      shardings = sharding.param_shardings({'a': _shape(3, 16)}, table, _mesh(), 'fsdp')
      assert shardings['a'].spec == P(None, 'fsdp')

  def test_device_put_follows_the_sharding(self):
    mesh = _mesh(data=2, fsdp=4)
    shardings = sharding.param_shardings({'mlp/kernel': _shape(16, 20)}, TABLE, mesh, 'fsdp')
    leaf = jax.device_put(np.arange(320.0).reshape(16, 20), shardings['mlp/kernel'])
    assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, 20)}


class TestCheckSharded:
  def test_error_names_a_replicated_leaf(self):
    tree = {'mlp/kernel': _shape(64, 64), 'vocabulary': _shape(13, 77)}
    shardings = sharding.param_shardings(tree, TABLE, _mesh(), 'fsdp')
    with pytest.raises(UserError, match=r'least sharded: vocabulary \(13, 77\)'):
      sharding.check_sharded_enough(tree, shardings)

  def test_small_replicated_leaves_are_tolerated(self):
    tree = {'mlp/kernel': _shape(64, 64), 'scale': _shape(13)}
    shardings = sharding.param_shardings(tree, TABLE, _mesh(), 'fsdp')
    sharding.check_sharded_enough(tree, shardings)
    with pytest.raises(UserError, match='scale'):
      sharding.check_sharded_enough(tree, shardings, tolerance=0.001)

  def test_one_device_and_no_leaves(self):
    tree = {'scale': _shape(13)}
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    sharding.check_sharded_enough(tree, sharding.param_shardings(tree, TABLE, mesh, 'fsdp'))
    sharding.check_sharded_enough({}, {})


class TestBatch:
  def test_batch_is_sharded_over_data_and_fsdp(self):
    mesh = _mesh(data=2, fsdp=2, tensor=2, strategy='fsdp_tensor')
    x = np.arange(24.0).reshape(8, 3)
    batch = sharding.put_batch({'x': x, 'none': None}, mesh)
    assert batch['none'] is None
    np.testing.assert_array_equal(batch['x'], x)
    assert {shard.data.shape for shard in batch['x'].addressable_shards} == {(2, 3)}
    assert sharding.host_positions(8, mesh) == list(range(8))
    assert sharding.host_part(mesh) == (0, 1)

  def test_batch_size_must_divide_over_devices_and_microbatches(self):
    mesh = _mesh()
    sharding.check_divides(16, mesh, accumulate=2)
    with pytest.raises(UserError, match='12 does not divide over 8 batch shards .*: use a mul'):
      sharding.check_divides(12, mesh)
    with pytest.raises(UserError, match='x 2 microbatches: use a multiple of 16'):
      sharding.check_divides(8, mesh, accumulate=2)


class TestConstrain:
  def test_without_a_mesh_does_nothing(self):
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, ('batch', None)) is x

  def test_batch_dimension_is_constrained(self):
    mesh = _mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
      x = jax.jit(lambda x: sharding.constrain(x * 2, ('batch', None)))(jnp.ones((16, 4)))
    assert x.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)

  def test_axes_that_do_not_divide_are_skipped(self):
    mesh = _mesh(data=2, fsdp=4)
    for batch_size, shards in ((4, 4), (2, 2), (3, 1)):
      with jax.set_mesh(mesh):
        x = jax.jit(lambda x: sharding.constrain(x * 2, ('batch', None)))(jnp.ones((batch_size, 4)))
      assert len({str(s.index) for s in x.addressable_shards}) == shards

  def test_heads_take_the_tensor_axis(self):
    mesh = _mesh(tensor=2, strategy='fsdp_tensor')
    with jax.set_mesh(mesh):
      x = jax.jit(lambda x: sharding.constrain(x, ('batch', None, 'heads')))(jnp.ones((4, 3, 6)))
    assert x.addressable_shards[0].data.shape == (1, 3, 3)

  def test_num_shards_counts_the_tensor_axis(self):
    assert sharding.num_shards('vocab') == 1
    with jax.set_mesh(_mesh(tensor=2, strategy='fsdp_tensor')):
      assert sharding.num_shards('vocab') == 2

  def test_inside_shard_map_does_nothing(self):
    mesh = _mesh()

    def body(x):
      return sharding.constrain(x, ('batch', None)) * 2

    with jax.set_mesh(mesh):
      mapped = jax.shard_map(body, in_specs=P('fsdp'), out_specs=P('fsdp'))
      np.testing.assert_array_equal(jax.jit(mapped)(jnp.ones((8, 2))), 2 * np.ones((8, 2)))


def _start(code: str, **variables: str) -> subprocess.Popen:
  environment = {key: value for key, value in os.environ.items() if not key.startswith('JAX_NUM')}
  environment |= variables
  return subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(code)], env=environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


# Two processes of four devices each, whose batch shards are interleaved, as on a TPU pod.
INTERLEAVED = """
  import jax, numpy as np
  from vpe_jax import sharding
  from vpe_jax.config import MeshConfig
  from vpe_jax.contracts import UserError
  sharding.initialize_distributed()
  index = jax.process_index()
  devices = jax.devices()
  devices = [devices[n] for n in (0, 4, 1, 5, 2, 6, 3, 7)]
  mesh = sharding.make_mesh(MeshConfig(), devices)
  positions = sharding.host_positions(16, mesh)
  assert positions == [n for n in range(16) if n // 2 % 2 == index], positions
  assert sharding.host_part(mesh) == (index, 2)
  batch = sharding.put_batch(np.arange(16.0)[positions], mesh)
  whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(batch)
  np.testing.assert_array_equal(jax.device_get(whole), np.arange(16.0))
  # Both processes hold parts of every batch shard, so they read the same elements.
  mesh = sharding.make_mesh(MeshConfig(tensor=2, strategy='fsdp_tensor'), devices)
  assert sharding.host_part(mesh) == (0, 1)
  assert sharding.host_positions(16, mesh) == list(range(16))
  assert sharding.put_batch(np.arange(16.0), mesh).shape == (16,)
  devices = [jax.devices()[n] for n in (0, 4, 1, 2, 3, 5, 6, 7)]
  mesh = sharding.make_mesh(MeshConfig(tensor=2, strategy='fsdp_tensor'), devices)
  try:
    sharding.host_part(mesh)
  except UserError as error:
    print('done', 'mesh.tensor=2' in str(error))
"""


class TestDistributed:
  def test_hosts_read_their_own_elements_in_any_order_of_devices(self):
    address = f'127.0.0.1:{sharding._free_port()}'
    flags = {
      'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
      'JAX_COORDINATOR_ADDRESS': address,
      'JAX_NUM_PROCESSES': '2',
    }
    processes = [_start(INTERLEAVED, **flags, JAX_PROCESS_ID=str(index)) for index in range(2)]
    try:
      for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out[-10:]) == (0, 'done True\n'), err[-3000:]
    finally:
      for process in processes:
        process.kill()
        process.communicate()

  def test_single_process_notices_sigterm(self):
    process = _start("""
      import time
      import jax
      from vpe_jax import sharding
      sharding.initialize_distributed()
      sharding.initialize_distributed()
      print('ready', jax.process_count(), flush=True)
      step = 0
      while not sharding.preempted(step):
        step += 1
        time.sleep(0.01)
      print('stops')
    """)
    assert process.stdout.readline() == 'ready 1\n'
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, 'stops\n'), err

  def test_address_alone_is_refused(self):
    code = """
      from vpe_jax import sharding
      from vpe_jax.contracts import UserError
      try:
        sharding.initialize_distributed()
      except UserError as error:
        print(error)
    """
    out, err = _start(code, JAX_COORDINATOR_ADDRESS='127.0.0.1:1').communicate(timeout=60)
    assert 'JAX_NUM_PROCESSES' in out, err[-3000:]

  def test_incomplete_or_invalid_variables_are_refused(self, monkeypatch):
    monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
    with pytest.raises(UserError, match='JAX_COORDINATOR_ADDRESS'):
      sharding.initialize_distributed()
    monkeypatch.setenv('JAX_NUM_PROCESSES', 'two')
    with pytest.raises(UserError, match='whole numbers'):
      sharding.initialize_distributed()
