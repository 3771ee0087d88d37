"""Tests of paths, atomic writes, renames and text files."""

from __future__ import annotations

import errno
import sys
import zlib

import pytest
from etils import epath

from vpe_jax import storage
from vpe_jax.contracts import UserError


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path / 'own'))
  assert storage.cache_dir() == tmp_path / 'own'
  monkeypatch.delenv('VPE_JAX_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert storage.cache_dir() == tmp_path / 'vpe_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert storage.cache_dir() == tmp_path / '.cache' / 'vpe_jax'


def test_cache_dir_is_local(monkeypatch):
  monkeypatch.setenv('VPE_JAX_CACHE', 'gs://bucket/cache')
  with pytest.raises(UserError, match='VPE_JAX_CACHE=gs://bucket/cache'):
    storage.cache_dir()


@pytest.mark.parametrize('resolved', [storage.cache_dir, lambda: storage.local_path('~nobody_x/y')])
def test_missing_home_folders_are_one_line_errors(monkeypatch, resolved):
  monkeypatch.setenv('VPE_JAX_CACHE', '~nobody_x')
  with pytest.raises(UserError, match='~nobody_x.* has no home folder'):
    resolved()


def test_temporary_files_on_object_stores_differ_between_hosts(monkeypatch):
  monkeypatch.setattr(storage.os, 'getpid', lambda: 1)  # as in every container
  path = epath.Path('gs://bucket/file')
  first, second = storage._temporary_path(path), storage._temporary_path(path)
  assert first.parent == second.parent == path.parent and first != second


def test_atomic_write_replaces_the_file_and_leaves_no_temporary(tmp_path):
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
    storage.write_atomic(path, 'text, not bytes')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_leaves_other_files_in_the_folder_alone(tmp_path):
  path, names = tmp_path / 'x.png', ('x.png.part', '.x.png.part', 'x.png.unfinished')
  for name in names:
    (tmp_path / name).write_text('mine')
  storage.write_atomic(path, b'new')
  with pytest.raises(TypeError):
    storage.write_atomic(path, 'text, not bytes')
  assert {(tmp_path / name).read_text() for name in names} == {'mine'}
  assert {item.name for item in tmp_path.iterdir()} == {'x.png', *names}


def test_the_scheme_decides_whether_a_path_is_remote():
  assert storage.is_remote('gs://bucket/run') and not storage.is_remote('runs/t2i-tiny')
  with pytest.raises(UserError, match='https://host/x is out of reach'):
    storage.resolve('https://host/x')
  with pytest.raises(UserError, match='empty'):
    storage.resolve('')


def test_missing_client_package_names_the_cure(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)  # makes its import fail
  path = storage.resolve('gs://bucket/run')
  with pytest.raises(UserError, match=r"gs://bucket/run.*pip install -e '.\[gcs\]'"):
    storage.probe(path, path.exists)


def test_full_disk_is_a_one_line_error_with_its_cure():
  with pytest.raises(UserError, match='cannot write x: No space left on device; free some space'):
    with storage.writing('x'):
      raise OSError(errno.ENOSPC, 'No space left on device')


def test_move_aside_replaces_nothing(tmp_path):
  for name, joint in (('a', ''), ('b', '-')):
    (tmp_path / name).touch()
    (tmp_path / f'was-{name}').write_text('older')
    new_name = storage.move_aside(epath.Path(tmp_path / name), f'was-{name}', joint)
    assert new_name == f'was-{name}{joint}2' and (tmp_path / new_name).exists()
    assert (tmp_path / f'was-{name}').read_text() == 'older'


def test_stable_hash_never_changes():
  # Held-out splits depend on these values.
  assert storage.stable_hash('colour', 'circle', 'red') == 6062675304412801978
  assert storage.stable_hash('a', 'b') != storage.stable_hash('ab')


def test_read_text_converts_line_ends_and_names_the_cure(tmp_path):
  path = tmp_path / 'x.txt'
  path.write_bytes('\ufeffone\r\ntwo \u2028 and\x0c\n\nfour\rfive'.encode())
  assert storage.read_text(path) == 'one\ntwo \u2028 and\x0c\n\nfour\nfive'
  path.write_bytes(b'one\n\xff')
  with pytest.raises(UserError, match='cannot read .*x.txt.*UTF-8'):
    storage.read_text(path)
  path.unlink()
  with pytest.raises(UserError, match='cannot read .*x.txt') as error:
    storage.read_text(path)
  assert 'UTF-8' not in str(error.value)  # Another encoding does not help here.


def test_local_expands_home_and_refuses_remote_paths(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert storage.local_path('~/x') == tmp_path / 'x'
  with pytest.raises(UserError, match='gs://b/x is on an object store.*gcsfuse'):
    storage.local_path('gs://b/x')


def test_checksum_is_crc32_over_all_blocks(tmp_path):
  content = bytes(range(256)) * 20_000
  (tmp_path / 'x').write_bytes(content)
  assert storage.checksum(tmp_path / 'x') == zlib.crc32(content)


def test_read_text_reads_object_stores_and_home_folders(tmp_path, monkeypatch):
  (tmp_path / 'x.txt').write_text('one')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert storage.read_text('~/x.txt') == 'one'
  on_bucket = lambda path: epath.Path(str(path).replace('gs://b', str(tmp_path)))
  monkeypatch.setattr(storage, 'resolve', on_bucket)
  assert storage.read_text('gs://b/x.txt') == 'one'
