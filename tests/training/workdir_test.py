"""Tests of the lock on a run's folder and of folders that can't be written."""

import subprocess
import sys

import pytest
from etils import epath

from tests.outcomes import refusal_of
from vpe_jax.contracts import UserError
from vpe_jax.training import workdir

_HOLD_LOCK = """
import fcntl, sys
file = open(sys.argv[1], 'a')
fcntl.flock(file, fcntl.LOCK_EX)
print('locked', flush=True)
sys.stdin.read()
"""


def _claim(folder):
  with workdir.locked(epath.Path(folder)):
    pass


def test_folder_is_unlocked_when_the_run_ends(tmp_path):
  with pytest.raises(KeyError), workdir.locked(epath.Path(tmp_path / 'new' / 'run')):
    with pytest.raises(UserError, match='new/run is in use by another process'):
      _claim(tmp_path / 'new' / 'run')
    raise KeyError
  _claim(tmp_path / 'new' / 'run')


def test_folder_is_unlocked_when_the_process_is_killed(tmp_path):
  command = [sys.executable, '-c', _HOLD_LOCK, str(tmp_path / workdir.LOCK)]
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
  with subprocess.Popen(command, **pipes) as holder:
    try:
      assert holder.stdout.readline() == b'locked\n'
      with pytest.raises(UserError, match='in use by another process'):
        _claim(tmp_path)
    finally:
      holder.kill()
  _claim(tmp_path)


def test_folder_that_cannot_be_created_is_a_one_line_error(tmp_path):
  (tmp_path / 'file').write_text('kept')
  for folder in (tmp_path / 'file', tmp_path / 'file' / 'run'):
    with pytest.raises(UserError, match='cannot write to .*choose another --workdir') as error:
      _claim(folder)
    assert '\n' not in str(error.value)
  assert (tmp_path / 'file').read_text() == 'kept'


def test_all_processes_learn_that_process_0_cannot_lock_the_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir.jax, 'process_index', lambda: 1)
  monkeypatch.setattr(workdir.sharding, 'gather_texts', lambda own: ['run is in use', own])
  assert refusal_of(_claim, tmp_path / 'run') == 'run is in use'
  assert not list(tmp_path.iterdir())


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
  def refuse(*_):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(workdir.fcntl, 'flock', refuse)
  _claim(tmp_path)
  assert 'could not be locked (Operation not supported)' in capsys.readouterr().out
