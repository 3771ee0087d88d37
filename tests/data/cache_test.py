"""The cache of encoded entries: complete, verified, or rejected."""

from __future__ import annotations

import concurrent.futures
import pickle
import threading

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


def _batches(arrays, start=0, end=23):
  for i in range(start, end, 5):
    yield {name: leaf[i : min(i + 5, end)] for name, leaf in arrays.items()}


def _write(fingerprint='one', offset=0):
  arrays = _arrays(offset=offset)
  return cache.write_cache(fingerprint, lambda start: _batches(arrays, start), shard=8)


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


@pytest.mark.parametrize('name', ['codes-00001.npy', 'latents-00002.npy'])
@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove'])
def test_damage_names_the_file_and_is_fixed_by_writing_again(name, damage):
  path = _write().folder / name
  if damage == 'flip':
    _flip(path)
  elif damage == 'truncate':
    path.write_bytes(path.read_bytes()[:-10])
  else:
    path.unlink()
  with pytest.raises(cache.DamagedCacheError, match=name):
    cache.open_cache('one')
  _write()
  np.testing.assert_array_equal(cache.open_cache('one')[9]['codes'], _arrays()['codes'][9])


# -1 and -20: without the last line end, and the one of the last shard.
@pytest.mark.parametrize('size', [0, 20, 0.5, -3, -1, -20])
def test_a_cache_with_an_incomplete_manifest_is_written_again(size):
  path = _write().folder / 'manifest.jsonl'
  content = path.read_bytes()
  path.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
  assert cache.open_cache('one') is None
  _write()
  assert path.read_bytes() == content
  np.testing.assert_array_equal(cache.open_cache('one')[9]['codes'], _arrays()['codes'][9])


def test_a_cache_with_another_fingerprint_is_rejected():
  _write('other').folder.rename(cache.location('one'))
  with pytest.raises(cache.DamagedCacheError, match='fingerprint'):
    cache.open_cache('one')


def test_interrupted_writing_continues_after_the_last_complete_shard(tmp_path):
  """Of any number of interruptions, none leaves other files."""
  arrays, starts = _arrays(), []

  def batches(start, end):
    starts.append(start)
    yield from _batches(arrays, start, end)
    if end < 23:
      raise RuntimeError('the encoder failed')

  for end in (13, 18):
    with pytest.raises(RuntimeError):
      cache.write_cache('one', lambda start, end=end: batches(start, end), shard=8)
    assert cache.open_cache('one') is None
  (stored,) = cache.list_caches()
  assert (stored.records, stored.complete) == (16, False)
  # A kill in the middle of a write leaves half a file and half a line.
  folder = cache.location('one')
  (folder / 'codes-00002.npy').write_bytes(b'half')
  with (folder / 'manifest.jsonl').open('ab') as file:
    file.write(b'{"count": 7, "entr')
  opened = cache.write_cache('one', lambda start: batches(start, 23), shard=8)
  assert starts == [0, 8, 16] and len(opened) == 23
  for index in range(23):
    np.testing.assert_array_equal(opened[index]['codes'], arrays['codes'][index])
  names = [f'{name}-{n:05d}.npy' for name in ('codes', 'latents') for n in range(3)]
  assert sorted(path.name for path in folder.iterdir()) == [*names, 'manifest.jsonl']
  assert list((tmp_path / 'encoded').iterdir()) == [folder]


def test_only_damaged_shards_and_later_ones_are_written_again():
  _flip(_write().folder / 'codes-00001.npy')
  starts, arrays = [], _arrays()
  cache.write_cache('one', lambda start: starts.append(start) or _batches(arrays, start), shard=8)
  assert starts == [8] and len(cache.open_cache('one')) == 23


def test_a_second_process_waits_and_uses_what_the_first_one_wrote():
  entered, finish = threading.Event(), threading.Event()
  arrays = _arrays()

  def slowly(start):
    entered.set()
    finish.wait(60)
    yield from _batches(arrays, start)

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(cache.write_cache, 'one', slowly, 8)
    assert entered.wait(60)
    second = pool.submit(cache.write_cache, 'one', lambda start: pytest.fail('encoded twice'), 8)
    assert not cache.delete_cache(cache.location('one').name)
    finish.set()
    assert first.result() == second.result() == cache.open_cache('one')
  assert cache.delete_cache(cache.location('one').name)
  assert cache.list_caches() == []


def test_no_permission_and_a_full_disk_name_the_cure_and_leave_nothing(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(cache.np, 'save', fail)
    with pytest.raises(UserError, match='No space left.*VPE_JAX_CACHE'):
      _write()
  assert not list((tmp_path / 'encoded').rglob('*.npy'))
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path / 'file'))
  with pytest.raises(UserError, match='VPE_JAX_CACHE'):
    _write()


def test_threads_read_shards_in_parallel_and_parse_no_header(monkeypatch):
  codes = np.arange(400, dtype=np.int32)[:, None]
  arrays = {'codes': codes, 'latents': np.zeros((400, 1, 1, 1))}
  opened = cache.write_cache('many', lambda start: [arrays], shard=1)
  monkeypatch.setattr('ast.literal_eval', lambda text: pytest.fail(f'parsed {text}'))
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    codes_read = list(pool.map(lambda index: opened[index]['codes'][0], range(400)))
  assert codes_read == list(range(400))


def test_an_empty_cache_opens():
  assert len(cache.write_cache('none', lambda start: [])) == 0
  assert len(cache.open_cache('none')) == 0


def test_large_codes_stay_integers():
  codes = np.random.default_rng(1).integers(2**24, 2**30, (9, 4, 4), np.int32)
  cache.write_cache('whole', lambda start: [{'latents': codes}], shard=4)
  opened = cache.open_cache('whole')
  for index in (0, 4, 8):
    np.testing.assert_array_equal(opened[index]['latents'], codes[index])
    assert opened[index]['latents'].dtype == np.int32
