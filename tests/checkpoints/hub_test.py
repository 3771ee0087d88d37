"""Models of the hub: one process downloads, and a run keeps its revisions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import t2i
from tests import fake_hub
from vpe_jax import systems
from vpe_jax.checkpoints import hub as hub_lib
from vpe_jax.checkpoints import sources
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import CheckpointConfig, to_dict
from vpe_jax.contracts import COUNTERS, UserError
from vpe_jax.storage import HubName, hub_name
from vpe_jax.training import runs

OLD = {'tokenizer.json': b'{}', 'vae/model.safetensors': b'old', 'vae/config.json': b'{}'}
NEW = OLD | {'vae/model.safetensors': b'new'}


@pytest.fixture
def hub(monkeypatch, tmp_path):
  """A hub on this machine."""
  with fake_hub.serving(monkeypatch, tmp_path / 'cache') as server:
    yield server


def _config(revision):
  """A config with two fields that name the hub."""
  config = t2i.get_config('debug')
  config.data.update(source='synthetic', tokenizer=f'qwen2.5:owner/name{revision}')
  config.model.init_from = f'owner/name{revision}:vae'
  return config


def _pinned(workdir, revision='', **changes):
  """The pinned config of a run, and its values of the two fields that name the hub."""
  config = _config(revision)
  config.update(changes)
  values = to_dict(runs.build(config.to_dict(), str(workdir)).config)
  return values, (values['data']['tokenizer'], values['model']['init_from'])


def _save(workdir, values):
  """A checkpoint of a run with this config."""
  store = Store(str(workdir / FOLDER), CheckpointConfig())
  state = dict.fromkeys(COUNTERS, 1) | {'params': {'a': jnp.ones(3)}, 'opt_state': {}, 'ema': {}}
  store.save(state, values, force=True)
  store.close()


def test_a_run_keeps_the_revisions_that_it_was_started_with(hub, tmp_path):
  old = hub.publish(OLD)
  values, names = _pinned(tmp_path / 'run')
  assert names == (f'qwen2.5:owner/name@{old}', f'owner/name@{old}:vae')
  _save(tmp_path / 'run', values)
  new = hub.publish(NEW)
  assert _pinned(tmp_path / 'run')[1] == names
  assert _pinned(tmp_path / 'branch', start=str(tmp_path / 'run'))[1] == names
  assert _pinned(tmp_path / 'other')[1][1] == f'owner/name@{new}:vae'
  assert _pinned(tmp_path / 'other', f'@{old}')[1] == names
  source = sources.download(hub_name(names[1]))
  assert (source / 'model.safetensors').read_bytes() == b'old'


@pytest.mark.parametrize('folder', ['', 'vae', 'vae/deep'])
def test_opened_weights_have_the_commit_in_their_name(hub, folder):
  """An import records this name."""
  file = safetensors.numpy.save({'a': np.ones(2, np.float32)})
  commit = hub.publish({f'{folder}/model.safetensors'.lstrip('/'): file})
  suffix = f':{folder}' if folder else ''
  source = sources.open_source(f'owner/name{suffix}')
  assert source.name == f'owner/name@{commit}{suffix}' and list(source.tensors) == ['a']


def test_a_revision_that_does_not_exist_is_a_one_line_error(hub, tmp_path):
  hub.publish(OLD)
  with pytest.raises(UserError, match='owner/name@nowhere.*revision') as error:
    _pinned(tmp_path, '@nowhere')
  assert '\n' not in str(error.value)


def test_a_stored_name_without_a_commit_is_looked_up(hub, tmp_path):
  """Such as that of a run which a program saved without `runs.build`."""
  commit = hub.publish(OLD)
  config = _config('').to_dict()
  _save(tmp_path / 'run', config)
  assert _pinned(tmp_path / 'run')[1][1] == f'owner/name@{commit}:vae'


def test_a_file_of_a_tokenizer_is_not_on_the_hub(tmp_path):
  config = _config('')
  config.data.tokenizer, config.model.init_from = 'bpe:folder/tokenizer.json', ''
  values = hub_lib.pin(systems.build(config.to_dict()), str(tmp_path))
  assert values['data']['tokenizer'] == 'bpe:folder/tokenizer.json'


def test_configs_without_the_hub_stay_as_they_are(tmp_path):
  system = systems.build(t2i.get_config('debug').to_dict())
  assert systems.build(hub_lib.pin(system, str(tmp_path))).config == system.config


@pytest.fixture
def processes(monkeypatch):
  """Runs a function as process 0, then as process 1 of two, which share the broadcast."""
  shared = []

  def as_process(index, run):
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    monkeypatch.setattr(hub_lib, '_broadcast', lambda own: shared.append(own) or shared[0])
    return run()

  return as_process


def test_other_processes_wait_and_read_the_commit_of_the_first(processes):
  name, calls = HubName('owner/name'), []

  def download(model):
    calls.append(model.revision)
    return 'a' * 40

  for index in (0, 1):
    run = lambda: hub_lib.commits_of({name: download})
    assert processes(index, run) == {name: 'a' * 40}
  assert calls == ['', 'a' * 40]


def test_every_process_downloads_the_models_of_a_config(hub, processes, tmp_path):
  commit = hub.publish(OLD)
  expected = (f'qwen2.5:owner/name@{commit}', f'owner/name@{commit}:vae')
  for index in (0, 1):
    assert processes(index, lambda: _pinned(tmp_path / 'run')[1]) == expected


def test_a_failed_download_ends_all_processes(processes):
  def download(model):
    raise UserError('no route to host')

  for index, message in ((0, 'no route'), (1, 'process 0 could not')):
    with pytest.raises(UserError, match=message):
      processes(index, lambda: hub_lib.commits_of({HubName('owner/name'): download}))


def test_names_have_a_revision_and_a_folder(tmp_path, monkeypatch):
  for text in ('owner/name', 'owner/name@v1', 'owner/name:vae', 'owner/name@refs/pr/1:a/b'):
    assert str(hub_name(text)) == text
  assert hub_name('owner/name@v1:vae') == HubName('owner/name', 'v1', 'vae')
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs' / 'mine').mkdir(parents=True)
  for text in ('runs/mine', 'name', '/owner/name', './name', 'a/b/c', 'gs://bucket/name'):
    assert hub_name(text) is None
