"""Tests of checkpoints: round trips, retention, damage, kills and other meshes."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpe_jax import devices, sharding
from vpe_jax.checkpoints import store as store_lib
from vpe_jax.checkpoints import weights
from vpe_jax.checkpoints.store import Store
from vpe_jax.config import CheckpointConfig, MeshConfig
from vpe_jax.contracts import COUNTERS, UserError

TABLE = ((r'.*kernel', ('embed', 'mlp')), (r'.*scale', ('embed',)))
CONFIG = {'name': 't2i', 'steps': [3, 4], 'optim': {'lr': 1e-3}}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def _mesh(devices: int = 8) -> jax.sharding.Mesh:
  return sharding.make_mesh(MeshConfig(), jax.devices()[:devices])


def _state(step: int, mesh: jax.sharding.Mesh, width: int = 64) -> dict[str, Any]:
  """A state with a nested optax state; its values differ at every step."""

  def make(key):
    ar_kernel, dit_kernel = (jax.random.normal(k, (width, 48)) for k in jax.random.split(key))
    ar = {'q': {'kernel': ar_kernel}, 'scale': ar_kernel[:, 0]}
    params = {'ar': ar, 'dit': {'kernel': dit_kernel}}
    return {
      'params': params,
      'opt_state': OPTIMIZER.init(params),
      'ema': {'ar': jax.tree.map(lambda x: x * 0.5, params['ar'])},
    }

  shapes = jax.eval_shape(make, jax.random.key(0))
  shardings = sharding.param_shardings(shapes, TABLE, mesh, 'fsdp')
  arrays = jax.jit(make, out_shardings=shardings)(jax.random.key(step))
  return {'stage': 1, 'step': step, 'stage_step': step - 1, 'examples_seen': 8 * step, **arrays}


def _abstract(mesh: jax.sharding.Mesh, width: int = 64):
  def abstract_of(record):
    state = _state(1, mesh, width)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      if isinstance(x, jax.Array) else x,
      state,
    )  # fmt: skip

  return abstract_of


def _assert_equal(actual: Any, expected: Any) -> None:
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _save(directory: Path, *steps: int, **config: int) -> None:
  store = Store(str(directory), CheckpointConfig(**{'every': 1, 'keep': 9, **config}))
  store.restore(_abstract(_mesh()))
  for step in steps:
    assert store.save(_state(step, _mesh()), CONFIG)
  store.close()


def _restore(directory: Path, mesh: jax.sharding.Mesh | None = None) -> Any:
  store = Store(str(directory), CheckpointConfig())
  try:
    return store.restore(_abstract(mesh or _mesh()))
  finally:
    store.close()


def _largest_file(folder: Path) -> Path:
  return max((f for f in folder.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)


def _flip_bit(file: Path, position: int, bit: int = 3) -> None:
  data = bytearray(file.read_bytes())
  data[position] ^= 1 << bit
  file.write_bytes(data)


class TestRoundTrip:
  def test_state_and_record_are_restored_bit_exactly(self, tmp_path):
    state = _state(3, _mesh())
    store = Store(str(tmp_path / 'a' / 'b'), CheckpointConfig(every=3))
    assert store.restore(_abstract(_mesh())) is None
    assert store.read(list) is None
    assert store.save(state, CONFIG)
    assert not store.save(state, CONFIG, force=True)  # just saved
    store.wait()
    records = []
    second = Store(str(tmp_path / 'a' / 'b'), CheckpointConfig(every=3))
    restored = second.restore(lambda record: records.append(record) or _abstract(_mesh())(record))
    _assert_equal(restored, state)
    assert restored['params']['dit']['kernel'].sharding == state['params']['dit']['kernel'].sharding
    assert records[0]['config'] == CONFIG
    counters = {name: records[0][name] for name in COUNTERS}
    assert counters == {'stage': 1, 'step': 3, 'stage_step': 2, 'examples_seen': 24}
    assert second.read(lambda paths: ())[1] == records[0]
    assert not second.save(restored, CONFIG, force=True)  # just restored
    store.close()
    second.close()

  def test_counters_may_be_arrays(self, tmp_path):
    state = _state(2, _mesh())
    state |= {name: jnp.int32(state[name]) for name in COUNTERS}
    store = Store(str(tmp_path), CheckpointConfig(every=2))
    store.save(state, CONFIG)
    store.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    restored = store.restore(lambda record: abstract)
    store.close()
    _assert_equal(restored, state)
    assert store.read(lambda paths: ())[1]['examples_seen'] == 16

  def test_saved_arrays_may_be_donated(self, tmp_path):
    state = _state(1, _mesh())
    copy = jax.device_get(state['params'])
    store = Store(str(tmp_path), CheckpointConfig(every=1))
    store.save(state, CONFIG)
    shift = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.block_until_ready(shift(state['params']))
    store.close()
    _assert_equal(jax.device_get(_restore(tmp_path)['params']), copy)

  @pytest.mark.parametrize(('save_devices', 'load_devices'), [(8, 4), (4, 8), (8, 1)])
  def test_number_of_devices_may_change(self, tmp_path, save_devices, load_devices):
    state = _state(1, _mesh(save_devices))
    store = Store(str(tmp_path), CheckpointConfig(every=1))
    with jax.set_mesh(_mesh(save_devices)):
      store.save(state, CONFIG)
      store.close()
    mesh = _mesh(load_devices)
    with jax.set_mesh(mesh):
      restored = _restore(tmp_path, mesh)
    _assert_equal(jax.device_get(restored), jax.device_get(state))
    assert len(restored['params']['dit']['kernel'].sharding.device_set) == load_devices

  def test_warns_of_a_different_machine(self, tmp_path, caplog, monkeypatch):
    _save(tmp_path, 1)
    monkeypatch.setattr(devices, 'machine', lambda: {'cpu_threads': 999, 'devices': '8 x cpu'})
    with caplog.at_level(logging.WARNING):
      assert _restore(tmp_path)['step'] == 1
    lines = [r.message for r in caplog.records if 'cpu_threads' in r.message]
    assert len(lines) == 1
    assert 'this process has 999' in lines[0]


class TestPolicy:
  def test_newest_and_multiples_are_kept(self, tmp_path):
    _save(tmp_path, *range(1, 8), keep=2, keep_every=3)
    store = Store(str(tmp_path), CheckpointConfig())
    assert store.steps() == [3, 6, 7]
    assert sorted(item.name for item in tmp_path.iterdir()) == ['3', '6', '7']
    store.close()

  def test_saves_when_due_or_forced(self, tmp_path):
    store = Store(str(tmp_path), CheckpointConfig(every=5))
    assert [step for step in range(12) if store.due(step)] == [5, 10]
    assert not store.save(_state(4, _mesh()), CONFIG)
    assert store.save(_state(4, _mesh()), CONFIG, force=True)
    store.close()
    assert store.steps() == [4]

  def test_two_runs_are_not_mixed(self, tmp_path):
    _save(tmp_path, 5)
    store = Store(str(tmp_path), CheckpointConfig(every=1))
    with pytest.raises(UserError, match='checkpoint of step 5'):
      store.save(_state(3, _mesh()), CONFIG)
    store.close()

  def test_checkpoint_of_another_model_is_refused(self, tmp_path):
    _save(tmp_path, 5)
    store = Store(str(tmp_path), CheckpointConfig())
    with pytest.raises(UserError, match=r"not fit the config: 'ema/ar/q/kernel' is \(\[64, 48\]"):
      store.restore(_abstract(_mesh(), width=32))
    store.close()
    assert store.steps() == [5]


def test_groups_start_with_any_leaf_and_are_bounded(monkeypatch):
  monkeypatch.setattr(store_lib, '_GROUP_BYTES', 16)
  sizes = {'empty': 0, 'large': 9, 'a': 3, 'b': 1, 'c': 1}
  leaves = {path: {'shape': [size], 'dtype': 'float32'} for path, size in sizes.items()}
  assert store_lib._groups(leaves, sizes) == [['empty'], ['large'], ['a', 'b'], ['c']]


def _truncate(folder: Path) -> None:
  file = _largest_file(folder)
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_largest(folder: Path) -> None:
  file = _largest_file(folder)
  _flip_bit(file, file.stat().st_size // 2)


def _edit_record(folder: Path) -> None:
  file = folder / '_CHECKPOINT_METADATA'
  text = file.read_text()
  file.write_text(text.replace('"examples_seen": 16', '"examples_seen": 17'))
  assert file.read_text() != text


DAMAGE = {
  'flipped bit': (_flip_largest, 'wrong checksum of '),
  'truncated': (_truncate, 'cannot be read'),
  'removed file': (lambda folder: _largest_file(folder).unlink(), 'cannot be read'),
  'emptied file': (lambda folder: _largest_file(folder).write_bytes(b''), 'cannot be read'),
  'removed marker': (lambda folder: (folder / 'commit_success.txt').unlink(), 'marker'),
  'edited record': (_edit_record, 'record was changed'),
  'removed record': (lambda folder: (folder / '_CHECKPOINT_METADATA').unlink(), 'cannot be read'),
}


# Orbax abandons its pending reads when an array can't be read.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
class TestDamage:
  @pytest.mark.parametrize('kind', DAMAGE)
  def test_is_reported_and_the_previous_checkpoint_is_used(self, tmp_path, caplog, kind):
    damage, message = DAMAGE[kind]
    _save(tmp_path, 1, 2)
    damage(tmp_path / '2')
    store = Store(str(tmp_path), CheckpointConfig(every=1, keep=2))
    with caplog.at_level(logging.WARNING):
      restored = store.restore(_abstract(_mesh()))
    _assert_equal(restored, _state(1, _mesh()))
    (line,) = [r.message for r in caplog.records if 'damaged' in r.message]
    assert 'checkpoint 2' in line
    assert message in line
    assert '\n' not in line
    # At step 2, the damaged folder is renamed and doesn't count as a checkpoint.
    assert store.save(_state(2, _mesh()), CONFIG)
    store.close()
    assert store.steps() == [1, 2]
    _assert_equal(_restore(tmp_path), _state(2, _mesh()))
    remaining = {item.name for item in tmp_path.iterdir()} - {'1', '2'}
    assert remaining == {'damaged-2'}

  def test_the_newest_record_is_that_of_the_newest_checkpoint_with_intact_arrays(self, tmp_path):
    _save(tmp_path / weights.FOLDER, 1, 2)
    assert weights.newest_record(str(tmp_path))['step'] == 2
    _flip_largest(tmp_path / weights.FOLDER / '2')
    assert weights.newest_record(str(tmp_path))['step'] == 1

  @pytest.mark.parametrize('name', ['load', 'checkpointables_metadata'])
  @pytest.mark.parametrize(
    'error',
    [
      OSError(errno.ESTALE, 'Stale file handle'),
      ValueError('UNAVAILABLE: Error reading "gs://bucket/run/checkpoints/2/state/"'),
    ],
    ids=lambda error: type(error).__name__,
  )
  def test_transient_error_is_not_damage(self, tmp_path, monkeypatch, name, error):
    _save(tmp_path, 1, 2)
    store = Store(str(tmp_path), CheckpointConfig(every=1))

    def fail(*_, **__):
      raise Exception('wrapped by Orbax') from error

    with monkeypatch.context() as patch, pytest.raises(Exception, match='wrapped by Orbax'):
      patch.setattr(store_lib.ocp, name, fail)
      store.restore(_abstract(_mesh()))
    _assert_equal(store.restore(_abstract(_mesh())), _state(2, _mesh()))
    assert store.save(_state(3, _mesh()), CONFIG)
    store.close()
    assert {item.name for item in tmp_path.iterdir()} == {'2', '3'}

  def test_unreachable_marker_is_not_damage(self, tmp_path, monkeypatch):
    _save(tmp_path, 1)
    stale = OSError(errno.ESTALE, 'Stale file handle')

    def fail(path):
      raise stale

    with monkeypatch.context() as patch, pytest.raises(OSError, match='Stale'):
      patch.setattr(type(store_lib.epath.Path(tmp_path)), 'read_bytes', fail)
      _restore(tmp_path)
    _assert_equal(_restore(tmp_path), _state(1, _mesh()))

  def test_full_disk_is_a_one_line_error_and_keeps_earlier_checkpoints(self, tmp_path, monkeypatch):
    _save(tmp_path, 1)
    store = Store(str(tmp_path), CheckpointConfig(every=1))
    store.restore(_abstract(_mesh()))

    def full(timeout):
      raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']\nmore")

    saving = types.SimpleNamespace(result=full)
    monkeypatch.setattr(store_lib.ocp, 'save_checkpointables_async', lambda *_, **__: saving)
    assert store.save(_state(2, _mesh()), CONFIG)
    with pytest.raises(UserError, match='No space left on device; .*free some space') as error:
      store.wait()
    assert '\n' not in str(error.value)
    store.close()
    _assert_equal(_restore(tmp_path), _state(1, _mesh()))

  def test_truncated_record_is_not_logged(self, tmp_path, caplog):
    _save(tmp_path, 1, 2)
    file = tmp_path / '2' / '_CHECKPOINT_METADATA'
    file.write_text(file.read_text()[:-200])
    with caplog.at_level(logging.WARNING):
      _assert_equal(_restore(tmp_path), _state(1, _mesh()))
    assert [r.message for r in caplog.records if 'custom_metadata' in r.message] == []
    assert len([r for r in caplog.records if 'damaged' in r.message]) == 1

  def test_foreign_files_named_like_steps_are_kept(self, tmp_path):
    _save(tmp_path, 1)
    for name in ('3', '9'):
      (tmp_path / name).mkdir()
      (tmp_path / name / 'notes.txt').write_text('mine')
    (tmp_path / '4').write_text('mine')
    (tmp_path / '007').mkdir()
    (tmp_path / 'damaged-3').mkdir()
    (tmp_path / 'old.orbax-checkpoint-tmp').mkdir()
    store = Store(str(tmp_path), CheckpointConfig(every=1, keep=2))
    _assert_equal(store.restore(_abstract(_mesh())), _state(1, _mesh()))
    (tmp_path / '2').mkdir()  # appears during the run
    for step in (2, 3, 4):
      assert store.save(_state(step, _mesh()), CONFIG)
    store.close()
    assert store.steps() == [3, 4]
    names = {item.name for item in tmp_path.iterdir()}
    renamed = {'damaged-2', 'damaged-3', 'damaged-3-2', 'damaged-4', 'damaged-9'}
    assert names == {'3', '4', '007', 'old.orbax-checkpoint-tmp', *renamed}
    for name in ('damaged-3-2', 'damaged-9'):
      assert (tmp_path / name / 'notes.txt').read_text() == 'mine'
    assert (tmp_path / 'damaged-4').read_text() == 'mine'

  def test_interrupted_deletion_is_completed(self, tmp_path, monkeypatch):
    _save(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
      patch.setattr(type(store_lib.epath.Path(tmp_path)), 'rmtree', lambda path: None)
      _save(tmp_path, 3, keep=2)
    assert {item.name for item in tmp_path.iterdir()} == {'2', '3', '1.orbax-checkpoint-tmp'}
    _save(tmp_path, 4, keep=2)
    assert {item.name for item in tmp_path.iterdir()} == {'3', '4'}

  def test_error_lists_all_damaged_checkpoints(self, tmp_path):
    _save(tmp_path, 1, 2)
    _truncate(tmp_path / '1')
    _flip_largest(tmp_path / '2')
    with pytest.raises(UserError, match='step 2: wrong checksum .*; step 1: it cannot be read'):
      _restore(tmp_path)

  def test_flipped_bit_in_any_file_is_detected_or_harmless(self, tmp_path):
    """Flips one bit in each file in turn: restore never returns changed values."""
    _save(tmp_path, 1)
    state = _state(1, _mesh())
    rng = random.Random(0)
    files = [file for file in (tmp_path / '1').rglob('*') if file.is_file()]
    detected = 0
    for file in (file for file in files if file.stat().st_size):
      intact = file.read_bytes()
      _flip_bit(file, rng.randrange(len(intact)), rng.randrange(8))
      try:
        _assert_equal(_restore(tmp_path), state)
      except UserError:
        detected += 1
      file.write_bytes(intact)
    assert detected >= 3
    _assert_equal(_restore(tmp_path), state)

  def test_object_store_without_a_finished_save_is_a_new_run(self, tmp_path, monkeypatch):
    _save(tmp_path, 1)
    (tmp_path / '1' / 'commit_success.txt').unlink()
    with pytest.raises(UserError, match='marker'):
      _restore(tmp_path)
    store = Store(str(tmp_path), CheckpointConfig(every=1))
    monkeypatch.setattr(store_lib, '_writes_in_place', lambda directory: True)
    assert store.restore(_abstract(_mesh())) is None
    assert store.save(_state(1, _mesh()), CONFIG)
    store.close()
    _assert_equal(_restore(tmp_path), _state(1, _mesh()))


# Saves a state of 50 MB at steps 1, 2, ... until it is killed; prints each step.
ENDLESS_SAVES = """
  import sys, time
  import jax, jax.numpy as jnp
  from vpe_jax.checkpoints.store import Store
  from vpe_jax.config import CheckpointConfig
  store = Store(sys.argv[1], CheckpointConfig(every=1, keep=2))
  big = {f'w{i}': jnp.zeros((1024, 1024)) for i in range(12)}
  grow = jax.jit(lambda tree, step: jax.tree.map(lambda x: jnp.full_like(x, step), tree))
  step = store.restore(lambda record: {
    **{n: 0 for n in ('stage', 'step', 'stage_step', 'examples_seen')},
    'params': jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), big)})
  start = step['step'] if step else 0
  assert not step or all(bool((leaf == start).all()) for leaf in step['params'].values())
  print('from', start, flush=True)
  for step in range(start + 1, 1000):
    state = {n: step for n in ('stage', 'step', 'stage_step', 'examples_seen')}
    store.save({**state, 'params': grow(big, step)}, {})
    print('saving', step, flush=True)
"""


def _start_saving(directory: Path) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(ENDLESS_SAVES), str(directory)], text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def test_kill_during_a_save_loses_no_complete_checkpoint(tmp_path):
  complete, unfinished = 0, 0
  for kill_at in (3, 2, 1):
    process = _start_saving(tmp_path)
    first = process.stdout.readline()
    assert first, process.stderr.read()
    # Complete saves exist; the interrupted save exists completely or not at all.
    assert int(first.split()[1]) in (complete, complete + 1), first
    complete = int(first.split()[1])
    for _ in range(kill_at):
      process.stdout.readline()
    # `saving n` is printed while step n is written in the background.
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    complete += kill_at - 1
    unfinished += any('orbax-checkpoint-tmp' in item.name for item in tmp_path.iterdir())
  assert unfinished, 'no kill interrupted a save'
  store = Store(str(tmp_path), CheckpointConfig(every=1, keep=2))
  arrays, record = store.read(lambda paths: paths)
  store.close()
  assert record['step'] >= complete
  assert all((leaf == record['step']).all() for leaf in arrays.values())


# Two processes of four devices each: save, restore, damage, restore; then one process can't read.
TWO_PROCESSES = """
  import pathlib, sys
  from unittest import mock
  import jax, jax.numpy as jnp, numpy as np
  from absl import logging
  from vpe_jax import sharding
  from vpe_jax.checkpoints import store as store_lib
  from vpe_jax.checkpoints.store import Store
  from vpe_jax.config import CheckpointConfig, MeshConfig
  from vpe_jax.contracts import UserError
  sharding.initialize_distributed()
  index, folder = jax.process_index(), pathlib.Path(sys.argv[1])
  mesh = sharding.make_mesh(MeshConfig())
  assert mesh.size == 8
  local = sharding.host_positions(16, mesh)
  assert local == list(range(8 * index, 8 * index + 8))
  batch = sharding.put_batch(np.arange(16.0)[local], mesh)
  assert float(jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(batch)) == 120
  names = ('stage', 'step', 'stage_step', 'examples_seen')
  shardings = {'w': jax.NamedSharding(mesh, jax.P('fsdp')), 'b': sharding.replicated(mesh)}
  make = jax.jit(lambda key: {'w': jax.random.normal(key, (64, 32)), 'b': jnp.ones(3)},
                 out_shardings=shardings)

  def state(step):
    return {**{name: step for name in names}, 'params': make(jax.random.key(step))}

  def abstract_of(record):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      if isinstance(x, jax.Array) else x, state(1))

  def equal(ours, theirs):
    compare = jax.jit(lambda a, b: jnp.all(a == b), out_shardings=sharding.replicated(mesh))
    return all(map(bool, jax.tree.leaves(jax.tree.map(compare, ours, theirs))))

  store = Store(str(folder), CheckpointConfig(every=1, keep=2))
  assert store.restore(abstract_of) is None
  for step in (1, 2, 3):
    assert store.save(state(step), {'seed': 0})
  store.close()
  store = Store(str(folder), CheckpointConfig(every=1, keep=2))
  restored = store.restore(abstract_of)
  assert restored['step'] == 3 and equal(restored['params'], state(3)['params'])
  # Damages a file that only the second process reads: both must restore the previous checkpoint.
  if index == 0:
    files = [f for f in (folder / '3').rglob('ocdbt.process_1/d/*') if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-500])
  jax.experimental.multihost_utils.sync_global_devices('damaged')
  store = Store(str(folder), CheckpointConfig(every=1, keep=2))
  restored = store.restore(abstract_of)
  assert restored['step'] == 2 and equal(restored['params'], state(2)['params'])
  assert store.save(state(3), {'seed': 0})
  store.close()
  assert store.steps() == [2, 3], store.steps()

  def restored_if_second_process_reads(error):
    # Reading the record of step 3 raises an error in the second process only.
    store = Store(str(folder), CheckpointConfig(every=1))
    read = store_lib.ocp.checkpointables_metadata
    def fail(path):
      if index == 1 and path.name == '3':
        raise error
      return read(path)
    with mock.patch.object(store_lib.ocp, 'checkpointables_metadata', fail):
      return store.restore(abstract_of)

  restored = restored_if_second_process_reads(FileNotFoundError('gone'))
  assert restored['step'] == 2 and equal(restored['params'], state(2)['params'])
  try:
    restored_if_second_process_reads(TimeoutError('timed out'))
  except (TimeoutError, UserError) as error:
    assert isinstance(error, TimeoutError) == (index == 1)
    print('done')
"""


def test_two_processes_save_and_agree_on_damage(tmp_path):
  with sharding.socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{listener.getsockname()[1]}'
  processes = []
  for index in range(2):
    environment = {
      **os.environ,
      'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
      'JAX_COORDINATOR_ADDRESS': address,
      'JAX_NUM_PROCESSES': '2',
      'JAX_PROCESS_ID': str(index),
    }
    command = [sys.executable, '-c', textwrap.dedent(TWO_PROCESSES), str(tmp_path)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    processes.append(subprocess.Popen(command, env=environment, **pipes))
  try:
    for process in processes:
      out, err = process.communicate(timeout=120)
      assert (process.returncode, out[-5:]) == (0, 'done\n'), err[-3000:]
  finally:
    for process in processes:
      process.kill()
      process.communicate()
