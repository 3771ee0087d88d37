"""Prepared folders: the same records as the original folder, with random access."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from tests.small_pipelines import IMAGES, small_pipeline
from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.formats import array_record
from vpe_jax.data.formats.array_record import Content, Shard, Writer
from vpe_jax.data.preparing import Settings, prepare
from vpe_jax.data.sources import open_source
from vpe_jax.data.transforms import Decoding

COUNT = 11


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Images of different shapes in folders of classes, with source images; unsorted lines."""
  folder = tmp_path_factory.mktemp('images')
  levels = np.random.default_rng(0)
  lines = []
  for number in (3, 1, 0, 2, *range(4, COUNT)):
    name = f'{("cat", "dog")[number % 2]}/{number:02d}.{("png", "jpg")[number % 3 == 0]}'
    for path in (folder / name, folder / 'before' / name):
      path.parent.mkdir(parents=True, exist_ok=True)
      shape = (8 + number, 20 - number, 3)
      Image.fromarray(levels.integers(0, 256, shape, np.uint8)).save(path)
    line = {'file': name, 'caption': f'a fox \u2028 {number} 🦊', 'reference': f'before/{name}'}
    lines.append(json.dumps(line | {'language': 'zh' if number == 5 else 'en'}))
  (folder / 'captions.jsonl').write_text('\n'.join([*lines, lines[0]]))  # a duplicate
  return folder


@pytest.fixture(scope='module')
def prepared(folder, tmp_path_factory):
  """The folder, prepared with source images in shards of 4."""
  to = tmp_path_factory.mktemp('prepared') / 'to'
  prepare(Settings(f'folder:{folder}', reference='reference', shard_records=4), str(to))
  return to


@pytest.fixture
def copy(prepared, tmp_path):
  """A copy of the prepared folder, to damage."""
  for path in prepared.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def _open(path, **fields):
  return open_source(DataConfig(source=f'folder:{path}', **fields))


def _same(record, expected):
  assert (record.id, record.caption, record.group, record.split) == (
    expected.id,
    expected.caption,
    expected.group,
    expected.split,
  )
  np.testing.assert_array_equal(record.image.render(12), expected.image.render(12))


@pytest.mark.parametrize('workers', [0, 1])
def test_batches_equal_those_of_the_folder(folder, prepared, workers):
  """Bitwise, for several configs, also in reader processes."""
  fields = {'image_size': 16, 'text_length': 8, 'source_images': True, 'fit': 'crop', 'examples': 9}
  for extra in ({'prompt_field': 'group', 'tokenizer': 'classes:cat,dog'}, {}):
    if workers and extra:
      continue
    batches = []
    for path in (folder, prepared):
      config = DataConfig(source=f'folder:{path}', workers=workers, **fields, **extra)
      with small_pipeline(config, 3, (*IMAGES, 'source_image')).batches(5, 4) as stream:
        batches.append([next(stream) for _ in range(4)])
    for batch, prepared_batch in zip(*batches, strict=True):
      jax.tree.map(np.testing.assert_array_equal, batch, prepared_batch)
      assert batch.inputs['image'].shape == batch.inputs['source_image'].shape == (4, 16, 16, 3)


def test_random_access_to_records(folder, prepared):
  plain, ours = _open(folder), _open(prepared)
  assert len(plain) == len(ours) == COUNT and len(_open(prepared, examples=2)) == 2
  for index in np.random.default_rng(1).permutation(COUNT):
    _same(plain[int(index)], ours[int(index)])
    assert ours[int(index)].reference is None  # The config needs none.
  for index in (-1, COUNT):
    with pytest.raises(IndexError):
      ours[index]


def test_recipes_may_mix_folders_and_prepared_folders(folder, prepared, tmp_path):
  (tmp_path / 'one').symlink_to(folder)
  (tmp_path / 'two').symlink_to(prepared)
  mixed = open_source(DataConfig(source='folders:one,two*2', root=str(tmp_path)))
  assert len(mixed) == 3 * COUNT
  for index in range(COUNT):
    _same(dataclasses.replace(mixed[index], id=mixed[COUNT + index].id), mixed[COUNT + index])
  assert mixed[2 * COUNT].id == 'two/folder/cat/00.jpg'
  assert len(list(mixed.stamps())) == COUNT + 1  # of every image, and of the manifest


def test_stamps_depend_only_on_the_manifest(prepared, copy):
  assert list(_open(prepared).stamps()) == list(_open(copy).stamps())
  manifest = json.loads((copy / 'prepared.json').read_text())
  manifest['shards'][0]['crc32'] += 1
  (copy / 'prepared.json').write_text(json.dumps(manifest))
  assert list(_open(prepared).stamps()) != list(_open(copy).stamps())


def test_a_source_pickles_small_and_reads_in_threads(prepared):
  source = _open(prepared)
  first = source[0].caption
  content = pickle.dumps(source)
  assert len(content) < 2000
  again = pickle.loads(content)
  assert again[0].caption == first
  read = [[] for _ in range(4)]
  threads = [
    threading.Thread(
      target=lambda out: out.extend(again[i].caption for i in range(COUNT)), args=(o,)
    )
    for o in read
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert read == [[again[i].caption for i in range(COUNT)]] * 4


def _content(number, size=65_536):
  return Content(str(number), '', 'x', os.urandom(size))


def test_reading_one_record_reads_no_other(tmp_path):
  with Writer(tmp_path / 'a') as writer:
    for number in range(40):
      writer.write(_content(number))
  assert 'group_size:1,' in ArrayRecordReader(str(tmp_path / 'a')).writer_options_string()
  shard = Shard('a', 40, (tmp_path / 'a').stat().st_size, 0)
  read = lambda index: array_record._read(str(tmp_path), shard, index).id

  def bytes_read():
    lines = Path('/proc/self/io').read_text().splitlines()
    return int(dict(line.split(': ') for line in lines)['rchar'])

  read(39)  # Opens the file.
  for index in (31, 3, 17):
    before = bytes_read()
    assert read(index) == str(index)
    assert 65_536 < bytes_read() - before < 1.5 * 65_536


def test_open_files_respect_the_limit_of_the_system(tmp_path, monkeypatch):
  shards = []
  for number in range(5):
    with Writer(tmp_path / str(number)) as writer:
      writer.write(_content(number, 10))
    shards.append(Shard(str(number), 1, (tmp_path / str(number)).stat().st_size, 0))
  monkeypatch.setattr(array_record.resource, 'getrlimit', lambda _: (514, 514))
  assert array_record._max_open_shards() == 2
  monkeypatch.setattr(array_record, '_readers', functools.cache(array_record._readers.__wrapped__))
  for _ in range(2):
    for number, shard in enumerate(shards):
      assert array_record._read(str(tmp_path), shard, 0).id == str(number)
  open_files = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')
          if os.path.islink(f'/proc/self/fd/{fd}')]  # fmt: skip
  assert sum(name.startswith(str(tmp_path)) for name in open_files) == 2


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'language': 'en'}, "language='' .*'en'"),
    ({'least_text_height': 4}, "least_text_height=0 .*4.*image_size=64 .*32.*fit='pad'"),
  ],
)
def test_other_filters_are_rejected(prepared, fields, message):
  with pytest.raises(UserError, match=message) as error:
    _open(prepared, image_size=32, fit='crop', **fields)
  assert '\n' not in str(error.value)


def test_missing_fields_are_named(folder, tmp_path):
  (tmp_path / 'in' / 'cat').mkdir(parents=True)
  Image.new('RGB', (4, 4)).save(tmp_path / 'in' / 'cat' / 'x.png')
  prepare(Settings(f'folder:{tmp_path}/in', captions=False), str(tmp_path / 'to'))
  assert _open(tmp_path / 'to', prompt_field='group')[0].group == 'cat'
  with pytest.raises(UserError, match='to .*captions'):
    _open(tmp_path / 'to')
  with pytest.raises(UserError, match='to .*source images'):
    _open(tmp_path / 'to', prompt_field='group', source_images=True)


def _shorten(folder):
  path = folder / 'images-00001.array_record'
  path.write_bytes(path.read_bytes()[:-1])


def _edit(**values):
  def edit(folder):
    path = folder / 'prepared.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

  return edit


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda f: (f / 'images-00002.array_record').unlink(), '00002.array_record'),
    (_shorten, r'00001.array_record has [\d,]+ bytes'),
    (_edit(format=3), 'prepared.json has format 3'),
    (_edit(format=None), 'prepared.json has format None'),
    (_edit(shards=[]), 'prepared.json .*no records'),
    (_edit(shards=[{'file': '../x', 'records': 1, 'bytes': 1, 'crc32': 1}]), 'another folder'),
    (_edit(shards=3), 'prepared.json is damaged'),
    (_edit(new=3), 'prepared.json is damaged'),
    (lambda f: (f / 'prepared.json').write_text('{"format"'), 'prepared.json is damaged'),
    (lambda f: (f / 'prepared.json').write_text('[]'), 'prepared.json is damaged'),
    (lambda f: (f / 'prepared.json').write_bytes(b'\xff\xfe'), 'prepared.json is damaged'),
  ],
)
def test_damage_found_on_opening(copy, damage, message):
  damage(copy)
  with pytest.raises(UserError, match=message) as error:
    _open(copy)
  assert '\n' not in str(error.value)


def test_damage_inside_a_shard_is_found_on_reading_and_by_verify(copy):
  assert [shard.records for shard in array_record.verify(copy)] == [4, 4, 3]
  path = copy / 'images-00001.array_record'
  content = bytearray(path.read_bytes())
  content[100] ^= 1  # Within its first record.
  path.write_bytes(content)
  source = _open(copy)
  assert source[3].caption and source[5].caption
  with pytest.raises(UserError, match='record 0 of .*00001.array_record') as error:
    source[4]
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='00001.array_record .*checksum'):
    list(array_record.verify(copy))


def test_verify_names_a_missing_file_of_hashes(copy):
  (copy / array_record.HASHES).unlink()
  try:
    error = str(list(array_record.verify(copy)))
  except (OSError, UserError) as raised:
    error = str(raised)
  assert f'{copy / array_record.HASHES} is missing: copy it again' in error


@pytest.mark.parametrize(
  'record', [b'', b'nothing', b'\x81\xa2id\xa1x', b'\xc1', b'\x91' * 5000, 'wrong type', 'more']
)
def test_invalid_records_are_named(tmp_path, record):
  if isinstance(record, str):
    values = {'id': 'x', 'caption': 'x', 'group': 'x', 'image': b'x', 'reference': b''}
    values |= {'image': 'text'} if record == 'wrong type' else {'more': 1}
    record = array_record.msgpack.packb(values)
  writer = ArrayRecordWriter(str(tmp_path / 'a'), 'group_size:1')
  writer.write(record)
  writer.close()
  with pytest.raises(UserError, match='record 0 of .*/a ') as error:
    array_record._read(str(tmp_path), Shard('a', 1, 1, 1), 0)
  assert '\n' not in str(error.value)


def test_an_invalid_image_is_named(tmp_path):
  with Writer(tmp_path / 'a') as writer:
    writer.write(Content('fox', '', 'x', b'no image'))
  shard = Shard('a', 1, (tmp_path / 'a').stat().st_size, 0)
  source = array_record.Prepared(str(tmp_path), (shard,), 1, Decoding(), False, '')
  with pytest.raises(UserError, match='unreadable image fox in .*/a'):
    source[0].image.render(8)


def test_a_full_disk_raises_oserror(tmp_path):
  with pytest.raises(OSError, match='No space left') as error, Writer(Path('/dev/full')) as writer:
    for number in range(100):
      writer.write(_content(number))
  assert error.value.errno == 28
