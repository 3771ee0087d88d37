"""The cache of encoded entries: complete, verified, or rejected."""

from __future__ import annotations

import concurrent.futures
import pickle

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.data import cache


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path))


def _arrays(count=23, offset=0):
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 99, (count, 6), np.int32) + offset
  return {'codes': codes, 'latents': rng.normal(size=(count, 2, 2, 4))}


def _write(fingerprint='one', offset=0):
  arrays = _arrays(offset=offset)
  batches = [{name: leaf[i : i + 5] for name, leaf in arrays.items()} for i in range(0, 23, 5)]
  return cache.write_cache(fingerprint, batches, shard=8)


def test_round_trip():
  arrays = _arrays()
  _write()
  opened = cache.open_cache('one')
  assert len(opened) == 23
  for index in (0, 7, 8, 22):
    entries = opened[index]
    np.testing.assert_array_equal(entries['codes'], arrays['codes'][index])
    np.testing.assert_array_equal(entries['latents'], arrays['latents'][index].astype(np.float32))
    assert entries['codes'].dtype == np.int32 and entries['latents'].dtype == np.float32
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
@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove'])
def test_damage_names_the_file_and_is_fixed_by_writing_again(name, damage):
  path = _write().folder / name
  if damage == 'flip' and name == 'manifest.json':
    path.write_text(path.read_text().replace('"count"', '"cound"'))
  elif damage == 'flip':
    _flip(path)
  elif damage == 'truncate':
    path.write_bytes(path.read_bytes()[:-10])
  else:
    path.unlink()
  with pytest.raises(cache.DamagedCacheError, match=name):
    cache.open_cache('one')
  _write()
  np.testing.assert_array_equal(cache.open_cache('one')[9]['codes'], _arrays()['codes'][9])


def test_a_cache_with_another_fingerprint_is_rejected():
  _write('other').folder.rename(cache.location('one'))
  with pytest.raises(cache.DamagedCacheError, match='fingerprint'):
    cache.open_cache('one')


def test_interrupted_writing_leaves_nothing(tmp_path):
  def batches():
    yield _arrays()
    raise RuntimeError('the encoder failed')

  with pytest.raises(RuntimeError):
    cache.write_cache('one', batches(), shard=8)
  assert cache.open_cache('one') is None
  assert list((tmp_path / 'encoded').iterdir()) == []


def _check_first_is_used(opened, tmp_path):
  np.testing.assert_array_equal(opened[9]['codes'], _arrays()['codes'][9])
  np.testing.assert_array_equal(cache.open_cache('one')[9]['codes'], _arrays()['codes'][9])
  assert list((tmp_path / 'encoded').iterdir()) == [cache.location('one')]


def test_a_cache_that_another_process_completed_first_is_used(tmp_path):
  def batches():
    _write()
    yield _arrays(offset=1)

  _check_first_is_used(cache.write_cache('one', batches(), shard=8), tmp_path)


def test_a_cache_that_appears_just_before_the_rename_is_used(tmp_path, monkeypatch):
  open_cache = cache.open_cache

  def open_then_write(fingerprint):
    monkeypatch.setattr(cache, 'open_cache', open_cache)
    assert open_cache(fingerprint) is None
    _write()

  monkeypatch.setattr(cache, 'open_cache', open_then_write)
  _check_first_is_used(_write(offset=1), tmp_path)


def test_no_permission_and_a_full_disk_name_the_cure_and_leave_nothing(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(cache.np, 'save', fail)
    with pytest.raises(UserError, match='No space left.*VPE_JAX_CACHE'):
      _write()
  assert list((tmp_path / 'encoded').iterdir()) == []
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path / 'file'))
  with pytest.raises(UserError, match='VPE_JAX_CACHE'):
    _write()


def test_threads_read_shards_in_parallel_and_parse_no_header(monkeypatch):
  codes = np.arange(400, dtype=np.int32)[:, None]
  arrays = {'codes': codes, 'latents': np.zeros((400, 1, 1, 1))}
  opened = cache.write_cache('many', [arrays], shard=1)
  monkeypatch.setattr('ast.literal_eval', lambda text: pytest.fail(f'parsed {text}'))
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    codes_read = list(pool.map(lambda index: opened[index]['codes'][0], range(400)))
  assert codes_read == list(range(400))


def test_an_empty_cache_opens():
  assert len(cache.write_cache('none', [])) == 0
  assert len(cache.open_cache('none')) == 0


def test_large_codes_stay_integers():
  codes = np.random.default_rng(1).integers(2**24, 2**30, (9, 4, 4), np.int32)
  cache.write_cache('whole', [{'latents': codes}], shard=4)
  opened = cache.open_cache('whole')
  for index in (0, 4, 8):
    np.testing.assert_array_equal(opened[index]['latents'], codes[index])
    assert opened[index]['latents'].dtype == np.int32
