"""Tests of weight files and of reading weights out of runs."""

from __future__ import annotations

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vpe_jax.checkpoints import model, weights
from vpe_jax.checkpoints.store import Store
from vpe_jax.config import CheckpointConfig
from vpe_jax.contracts import UserError


def _make_tree() -> dict:
  rng = np.random.default_rng(0)
  return {
    'ar': {'q': {'kernel': rng.normal(size=(6, 4)).astype(np.float32).T}, 'scale': jnp.ones(3)},
    'count': np.arange(3, dtype=np.int32),
    'scalar': np.float32(1.5).reshape(()),
  }


def _save_run(workdir, ema: bool = True, step: int = 4) -> dict:
  """Saves a checkpoint of a run; returns its raw parameters."""
  params = {'a': {'w': jnp.arange(8.0), 'frozen': jnp.ones(3)}, 'b': jnp.zeros((2, 2))}
  averages = {'a': {'w': jnp.arange(8.0) + 0.5}} if ema else {}
  state = {'stage': 1, 'step': step, 'stage_step': 2, 'examples_seen': 32, 'params': params}
  state |= {'opt_state': {'mu': params, 'count': jnp.int32(4)}, 'ema': averages}
  store = Store(str(workdir / 'checkpoints'), CheckpointConfig())
  store.save(state, {'name': 't2i', 'steps': [3, 4]}, force=True)
  store.close()
  return params


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_file_round_trip(tmp_path, dtype):
  path = str(tmp_path / 'new' / 'w.safetensors')
  weights.save(path, _make_tree(), {'config': '{"a": 1}'}, dtype)
  tree, metadata = weights.load(path)
  expected = jax.tree.map(
    lambda x: np.asarray(jnp.asarray(x, dtype if x.dtype == np.float32 else x.dtype)), _make_tree()
  )
  jax.tree.map(np.testing.assert_array_equal, tree, jax.tree.map(np.asarray, expected))
  assert tree['ar']['q']['kernel'].dtype == np.float32
  assert tree['count'].dtype == np.int32
  assert tree['scalar'].shape == ()
  assert metadata['config'] == '{"a": 1}'
  assert metadata['dtype'] == dtype
  assert metadata['version']
  assert metadata['fingerprint'] == weights.fingerprint(tree)
  assert [item.name for item in (tmp_path / 'new').iterdir()] == ['w.safetensors']


def test_existing_file_is_replaced_only_with_overwrite(tmp_path):
  path = str(tmp_path / 'w.safetensors')
  weights.save(path, {'a': np.ones(2, np.float32)}, {})
  with pytest.raises(UserError, match='exists'):
    weights.save(path, {'a': np.zeros(2, np.float32)}, {})
  np.testing.assert_array_equal(weights.load(path)[0]['a'], np.ones(2))
  weights.save(path, {'a': np.zeros(2, np.float32)}, {}, overwrite=True)
  np.testing.assert_array_equal(weights.load(path)[0]['a'], np.zeros(2))
  with pytest.raises(UserError, match='int4'):
    weights.save(path, {}, {}, dtype='int4', overwrite=True)
  with pytest.raises(UserError, match='w.npz.*ends in .safetensors'):
    weights.save(str(tmp_path / 'w.npz'), {}, {})


def test_other_files_in_the_folder_are_left_alone(tmp_path):
  unrelated = tmp_path / 'w.safetensors.unfinished'
  unrelated.write_text('mine')
  weights.save(str(tmp_path / 'w.safetensors'), {'a': np.ones(2, np.float32)}, {})
  assert unrelated.read_text() == 'mine'
  assert len(list(tmp_path.iterdir())) == 2


def test_fingerprint_depends_on_paths_shapes_and_bits():
  base = {'a': np.ones((2, 3), np.float32)}
  equal = {'a': jnp.ones((2, 3))}
  variants = [{'b': base['a']}, {'a': base['a'].reshape(3, 2)}, {'a': -base['a']}]
  assert weights.fingerprint(base) == weights.fingerprint(equal)
  assert len({weights.fingerprint(tree) for tree in [base, *variants]}) == 4
  definition = hashlib.sha256(b'a (2, 3) float32\n' + base['a'].tobytes()).hexdigest()
  assert weights.fingerprint(base) == definition[:12]


def test_ema_weights_of_a_run_replace_raw_ones(tmp_path):
  params = _save_run(tmp_path)
  raw, metadata = weights.load_run(str(tmp_path), 'raw')
  jax.tree.map(np.testing.assert_array_equal, raw, params)
  assert metadata['weights'] == 'raw'
  tree, metadata = weights.load(str(tmp_path))
  np.testing.assert_array_equal(tree['a']['w'], np.arange(8) + 0.5)
  np.testing.assert_array_equal(tree['a']['frozen'], np.ones(3))
  assert isinstance(tree['a']['w'], np.ndarray)
  assert json.loads(metadata['config']) == {'name': 't2i', 'steps': [3, 4]}
  assert (metadata['weights'], metadata['step'], metadata['stage']) == ('ema', '4', '1')


def test_any_saved_step_is_read(tmp_path):
  for step in (4, 6):
    _save_run(tmp_path, step=step)
  read = lambda step: weights.load_run(str(tmp_path), 'ema', step=step)[1]['step']
  assert (read(None), read(4), read(6)) == ('6', '4', '6')
  with pytest.raises(UserError, match='no checkpoint of step 5; steps: 4, 6'):
    read(5)
  with pytest.raises(UserError, match='is a file of weights, not a run: leave --step=5 out'):
    model.load('assets:siglip', step=5)


def test_tilde_expands_to_the_home_folder(tmp_path, monkeypatch):
  _save_run(tmp_path / 'run')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert weights.load('~/run')[1]['step'] == weights.load_run('~/run')[1]['step'] == '4'


def test_missing_client_package_names_the_cure(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)  # makes its import fail
  for load in (weights.load, weights.load_run):
    with pytest.raises(UserError, match=r"gs://bucket/run.*pip install -e '.\[gcs\]'") as error:
      load('gs://bucket/run')
    assert '\n' not in str(error.value)


def test_run_without_ema_gives_raw_weights(tmp_path):
  params = _save_run(tmp_path, ema=False)
  tree, metadata = weights.load_run(str(tmp_path), 'ema')
  jax.tree.map(np.testing.assert_array_equal, tree, params)
  assert metadata['weights'] == 'raw'


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('assets:tinny', "did you mean 'tiny'"),
    ('{tmp}/none.safetensors', 'no file'),
    ('{tmp}/none', 'neither assets:NAME'),
    ('{tmp}', 'has no checkpoint yet: python -m vpe_jax.main'),
  ],
)
def test_missing_weights_name_the_cure(tmp_path, source, message):
  with pytest.raises(UserError, match=message) as error:
    weights.load(source.format(tmp=tmp_path))
  assert '\n' not in str(error.value)


def test_missing_asset_names_the_config_that_trains_it(tmp_path, monkeypatch):
  monkeypatch.setattr(weights.importlib.resources, 'files', lambda _: tmp_path)
  with pytest.raises(UserError, match='--config=configs/siglip.py:evaluator_network'):
    weights.load('assets:evaluator_network')
  path = tmp_path / 'assets' / 'evaluator_network.safetensors'
  weights.save(str(path), {'a': np.ones(2)}, {'config': '{}'})
  tree, metadata = weights.load('assets:evaluator_network')
  assert (tree['a'].dtype, metadata['config']) == (np.float32, '{}')


def test_changed_bits_are_detected(tmp_path):
  path = tmp_path / 'w.safetensors'
  weights.save(str(path), {'a': np.ones(64, np.float32)}, {}, 'float32')
  data = bytearray(path.read_bytes())
  data[-6] ^= 4
  path.write_bytes(data)
  with pytest.raises(UserError, match=r'w.safetensors. is damaged.*get it again'):
    weights.load(str(path))
  # A file without a fingerprint is not verified.
  path.write_bytes(safetensors.numpy.save({'a': np.ones(64, np.float32)}, {'config': '{}'}))
  assert weights.load(str(path))[1] == {'config': '{}'}


@pytest.mark.parametrize('name', weights.ASSET_CONFIGS)
def test_assets_are_intact(name):
  tree, metadata = weights.load(f'assets:{name}')
  assert metadata['fingerprint'] == weights.fingerprint(tree)


def test_truncated_file_is_refused(tmp_path):
  path = tmp_path / 'w.safetensors'
  weights.save(str(path), _make_tree(), {})
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='w.safetensors'):
    weights.load(str(path))


def test_unknown_kind_of_weights_is_refused(tmp_path):
  with pytest.raises(UserError, match="neither 'ema' nor 'raw'"):
    weights.load_run(str(tmp_path), 'best')
