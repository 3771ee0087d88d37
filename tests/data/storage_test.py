"""The cache folder and whole writes."""

from __future__ import annotations

import pytest

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


def test_stable_hash_never_changes():
  # Held-out splits hang on these numbers: another value would move the splits.
  assert storage.stable_hash('colour', 'circle', 'red') == 6062675304412801978
  assert storage.stable_hash('a', 'b') != storage.stable_hash('ab')
