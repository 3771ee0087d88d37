"""The cache of codes and latents: whole, verified, or refused."""

from __future__ import annotations

import concurrent.futures
import pickle

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.data import cache


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path))


def _arrays(count=23):
  draw = np.random.default_rng(0)
  return draw.integers(0, 99, (count, 6), np.int32), draw.normal(size=(count, 2, 2, 4))


def _write(fingerprint='one', plus=0):
  codes, latents = _arrays()
  codes = codes + plus
  pieces = [(codes[i : i + 5], latents[i : i + 5]) for i in range(0, len(codes), 5)]
  return cache.write_cache(fingerprint, pieces, shard=8)


def test_what_was_written_is_read():
  codes, latents = _arrays()
  _write()
  opened = cache.open_cache('one')
  assert len(opened) == 23
  for index in (0, 7, 8, 22):
    found = opened[index]
    np.testing.assert_array_equal(found[0], codes[index])
    np.testing.assert_array_equal(found[1], latents[index].astype(np.float32))
    assert found[0].dtype == np.int32 and found[1].dtype == np.float32
  with pytest.raises(IndexError):
    opened[23]
  assert len(pickle.dumps(opened)) < 1000


def test_absent_cache_is_none():
  assert cache.open_cache('one') is None
  _write('other')
  assert cache.open_cache('one') is None


def _flip(path):
  content = bytearray(path.read_bytes())
  content[-3] ^= 4
  path.write_bytes(content)


@pytest.mark.parametrize('name', ['codes-00001.npy', 'latents-00002.npy', 'manifest.json'])
@pytest.mark.parametrize('harm', ['flip', 'truncate', 'remove'])
def test_damage_is_named_and_a_new_cache_cures_it(name, harm):
  path = _write().folder / name
  if harm == 'flip' and name == 'manifest.json':
    path.write_text(path.read_text().replace('"count"', '"cound"'))
  elif harm == 'flip':
    _flip(path)
  elif harm == 'truncate':
    path.write_bytes(path.read_bytes()[:-10])
  else:
    path.unlink()
  with pytest.raises(cache.DamagedCacheError, match=name):
    cache.open_cache('one')
  _write()
  np.testing.assert_array_equal(cache.open_cache('one')[9][0], _arrays()[0][9])


def test_other_fingerprint_in_its_place_is_refused():
  _write('other').folder.rename(cache.location('one'))
  with pytest.raises(cache.DamagedCacheError, match='another fingerprint'):
    cache.open_cache('one')


def test_interrupted_writing_leaves_nothing(tmp_path):
  def pieces():
    yield _arrays()
    raise RuntimeError('the encoder failed')

  with pytest.raises(RuntimeError):
    cache.write_cache('one', pieces(), shard=8)
  assert cache.open_cache('one') is None
  assert list((tmp_path / 'encoded').iterdir()) == []


def _assert_first_is_kept(opened, tmp_path):
  np.testing.assert_array_equal(opened[9][0], _arrays()[0][9])
  np.testing.assert_array_equal(cache.open_cache('one')[9][0], _arrays()[0][9])
  assert list((tmp_path / 'encoded').iterdir()) == [cache.location('one')]


def test_a_cache_that_another_process_finished_first_is_used(tmp_path):
  def pieces():
    _write()
    yield _arrays()[0] + 1, _arrays()[1]

  _assert_first_is_kept(cache.write_cache('one', pieces(), shard=8), tmp_path)


def test_a_cache_that_appears_before_our_rename_is_used(tmp_path, monkeypatch):
  look = cache.open_cache

  def too_early(fingerprint):
    monkeypatch.setattr(cache, 'open_cache', look)
    assert look(fingerprint) is None
    _write()

  monkeypatch.setattr(cache, 'open_cache', too_early)
  _assert_first_is_kept(_write(plus=1), tmp_path)


def test_a_cache_folder_that_cannot_be_written_names_the_cure(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path / 'file'))
  with pytest.raises(UserError, match='cannot write to the cache .*set VPE_JAX_CACHE') as error:
    _write()
  assert '\n' not in str(error.value)


def test_a_full_disk_names_the_cure_and_leaves_nothing(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(cache.np, 'save', full)
  with pytest.raises(UserError, match='No space left on device.*VPE_JAX_CACHE'):
    _write()
  assert list((tmp_path / 'encoded').iterdir()) == []


def test_threads_read_shards_at_once_and_parse_nothing(monkeypatch):
  codes = np.arange(400, dtype=np.int32)[:, None]
  opened = cache.write_cache('many', [(codes, np.zeros((400, 1, 1, 1)))], shard=1)
  monkeypatch.setattr('ast.literal_eval', lambda text: pytest.fail(f'parsed {text}'))
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    found = list(pool.map(lambda index: opened[index][0][0], range(400)))
  assert found == list(range(400))


def test_an_empty_cache_opens():
  assert len(cache.write_cache('none', [])) == 0
  assert len(cache.open_cache('none')) == 0


def test_codes_of_discrete_pictures_stay_whole_numbers():
  """And a plan may have no codes at all."""
  pictures = np.random.default_rng(1).integers(0, 2**17, (9, 4, 4), np.int32)
  cache.write_cache('whole', [(np.zeros((9, 0), np.int32), pictures)], shard=4)
  opened = cache.open_cache('whole')
  for index in (0, 4, 8):
    plan, found = opened[index]
    np.testing.assert_array_equal(found, pictures[index])
    assert found.dtype == np.int32 and plan.shape == (0,)
