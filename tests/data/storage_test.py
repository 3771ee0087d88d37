"""The cache folder and whole writes."""

from __future__ import annotations

import errno
import sys

import pytest
from etils import epath

from vpe_jax.contracts import UserError
from vpe_jax.data import storage


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path / 'own'))
  assert storage.cache_dir() == tmp_path / 'own'
  monkeypatch.delenv('VPE_JAX_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert storage.cache_dir() == tmp_path / 'vpe_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert storage.cache_dir() == tmp_path / '.cache' / 'vpe_jax'


def test_write_replaces_and_leaves_nothing_else(tmp_path):
  path = tmp_path / 'deep' / 'file'
  storage.write_atomic(path, b'old')
  storage.write_atomic(path, b'new')
  assert path.read_bytes() == b'new'
  assert list(path.parent.iterdir()) == [path]
  assert path.stat().st_mode & 0o777 == 0o644


def test_failed_write_keeps_the_old_file(tmp_path):
  path = tmp_path / 'file'
  storage.write_atomic(path, b'old')
  with pytest.raises(TypeError):
    storage.write_atomic(path, 'text is no content')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_files_of_other_people_beside_are_left_alone(tmp_path):
  path, names = tmp_path / 'x.png', ('x.png.part', '.x.png.part', 'x.png.unfinished')
  for name in names:
    (tmp_path / name).write_text('mine')
  storage.write_atomic(path, b'new')
  with pytest.raises(TypeError):
    storage.write_atomic(path, 'no bytes')
  assert {(tmp_path / name).read_text() for name in names} == {'mine'}
  assert {item.name for item in tmp_path.iterdir()} == {'x.png', *names}


def test_remote_places_are_told_by_their_scheme():
  assert storage.is_remote('gs://bucket/run') and not storage.is_remote('runs/t2i-tiny')
  with pytest.raises(UserError, match='https://host/x is out of reach'):
    storage.place('https://host/x')
  with pytest.raises(UserError, match='empty'):
    storage.place('')


def test_a_store_without_its_package_names_the_cure(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)  # an import of it fails
  place = storage.place('gs://bucket/run')
  with pytest.raises(UserError, match=r"gs://bucket/run.*pip install -e '.\[gcs\]'"):
    storage.reached(place, place.exists)


def test_a_full_disk_is_one_line_with_its_cure():
  with pytest.raises(UserError, match='cannot write x: No space left on device; free some space'):
    with storage.writing('x'):
      raise OSError(errno.ENOSPC, 'No space left on device')


def test_what_is_put_aside_replaces_nothing(tmp_path):
  for name, joint in (('a', ''), ('b', '-')):
    (tmp_path / name).touch()
    (tmp_path / f'was-{name}').write_text('older')
    found = storage.put_aside(epath.Path(tmp_path / name), f'was-{name}', joint)
    assert found == f'was-{name}{joint}2' and (tmp_path / found).exists()
    assert (tmp_path / f'was-{name}').read_text() == 'older'


def test_stable_hash_never_changes():
  # Held-out splits hang on these numbers: another value would move the splits.
  assert storage.stable_hash('colour', 'circle', 'red') == 6062675304412801978
  assert storage.stable_hash('a', 'b') != storage.stable_hash('ab')
