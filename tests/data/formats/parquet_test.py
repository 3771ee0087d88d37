"""Parquet files as on the Hugging Face hub: columns, row groups, and damage."""

from __future__ import annotations

import io
import pickle
import sys

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet as pq

from vpe_jax.contracts import UserError
from vpe_jax.data.formats import parquet
from vpe_jax.data.formats.entries import FieldSpec
from vpe_jax.data.inputs import RawRecord
from vpe_jax.data.preparing import Settings, prepare

FIELDS = FieldSpec()


def _png(number):
  content = io.BytesIO()
  Image.new('RGB', (4, 4), (number, 0, 0)).save(content, 'png')
  return content.getvalue()


def _write(path, count, rows=3, **columns):
  """Writes a file of captions and of images as structs, in row groups."""
  values = {
    'image': [{'bytes': _png(n), 'path': f'/etc/{n}.png'} for n in range(count)],
    'caption': [f' caption {n} 🦊' for n in range(count)],
  }
  table = pyarrow.table({k: v for k, v in (values | columns).items() if v is not None})
  pq.write_table(table, path, row_group_size=rows)
  return path


def _read(path, fields=FIELDS, part=slice(None)):
  source = parquet.open_parquet(str(path), fields)
  locations = list(source.locations(path))
  assert len(locations) == source.count()
  return list(source.read(locations[part]))


@pytest.mark.parametrize('part', [slice(None), slice(1, 5), slice(4, 6), slice(70, 75)])
def test_any_slice_of_rows_is_read(tmp_path, part):
  """Across row groups and batches."""
  path = _write(tmp_path / 'a.parquet', 80, rows=70)
  records = _read(path, part=part)
  numbers = range(80)[part]
  assert [record.content.id for record in records] == [f'a/{n}' for n in numbers]
  assert [record.content.caption for record in records] == [f'caption {n} 🦊' for n in numbers]
  assert [record.content.image for record in records] == [_png(n) for n in numbers]


def test_plain_bytes_large_types_and_other_names(tmp_path):
  images = [_png(n) for n in range(4)]
  path = _write(
    tmp_path / 'a.parquet',
    4,
    image=None,
    caption=None,
    after=pyarrow.array(images, pyarrow.large_binary()),
    before=pyarrow.array(images[::-1], pyarrow.binary()),
    annotation=pyarrow.array(list('abcd'), pyarrow.large_string()),
    language=['en'] * 4,
  )
  records = _read(path, FieldSpec(True, True, 'after', 'annotation', 'before'))
  assert [record.content.caption for record in records] == list('abcd')
  assert [record.content.image for record in records] == images
  assert [record.content.reference for record in records] == images[::-1]
  assert records[0].values == ({'language': 'en'},)


@pytest.mark.parametrize(
  'kind',
  [pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.string_view()],
  ids=['categorical', 'string_view'],
)
def test_captions_of_other_text_types_are_read(tmp_path, kind):
  caption = pyarrow.array(['a fox', 'a dog', 'a fox']).cast(kind)
  _write(tmp_path / 'a.parquet', 3)
  _write(tmp_path / 'b.parquet', 3, caption=caption)
  captions = [record.content.caption for record in _read(tmp_path)]
  assert captions[3:] == ['a fox', 'a dog', 'a fox']


@pytest.mark.parametrize('kind', [pyarrow.list_, pyarrow.large_list, pyarrow.list_view])
def test_lists_of_captions_are_read(tmp_path, kind):
  texts = [[' a fox ', 'a red fox', None], ['a dog'], [], None]
  caption = pyarrow.array(texts, kind(pyarrow.string()))
  records = _read(_write(tmp_path / 'a.parquet', 4, caption=caption))
  contents = [(record.content.caption, record.content.captions) for record in records]
  assert contents == [('a fox', ('a fox', 'a red fox')), ('a dog', ()), ('', ()), ('', ())]


def test_rows_without_image_bytes_are_unusable(tmp_path):
  (tmp_path / 'x.png').write_bytes(_png(0))
  image = [
    {'bytes': None, 'path': str(tmp_path / 'x.png')},
    None,
    {'bytes': _png(1), 'path': ''},
  ]
  path = _write(tmp_path / 'a.parquet', 3, image=image, caption=[None, 'x', None])
  records = _read(path)
  assert [isinstance(record, RawRecord) for record in records] == [False, False, True]
  assert 'row 0 of ' in records[0].reason and 'row 1 of ' in records[1].reason
  assert records[2].content.caption == ''


def test_rows_with_invalid_utf_8_are_unusable(tmp_path):
  texts = pyarrow.array([b'a', b'\xff\xfe', b'c', b'd'], pyarrow.binary())
  caption = pyarrow.Array.from_buffers(pyarrow.string(), 4, texts.buffers())
  records = _read(_write(tmp_path / 'a.parquet', 4, rows=4, caption=caption))
  assert [isinstance(record, RawRecord) for record in records] == [True, False, True, True]
  assert 'row 1 of' in records[1].reason and 'not UTF-8' in records[1].reason
  assert [record.content.caption for record in records if isinstance(record, RawRecord)] == [
    'a',
    'c',
    'd',
  ]


def test_rows_of_a_damaged_row_group_are_unusable(tmp_path):
  path = _write(tmp_path / 'a.parquet', 6)
  content = bytearray(path.read_bytes())
  start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
  content[start : start + 40] = b'\xff' * 40
  path.write_bytes(content)
  records = _read(path)
  assert [isinstance(record, RawRecord) for record in records] == [False] * 3 + [True] * 3
  assert 'row group 0 of ' in records[0].reason


def test_rows_that_disappear_before_they_are_read_have_a_reason(tmp_path):
  path = _write(tmp_path / 'a.parquet', 3)
  source = parquet.open_parquet(str(path), FIELDS)
  locations = list(source.locations(tmp_path))
  _write(path, 2)
  *records, unusable = source.read(locations)
  assert len(records) == 2 and f'{path} changed' in unusable.reason


def test_files_are_prepared_in_order(tmp_path):
  (tmp_path / 'deep').mkdir()
  for name in ('b', 'a', 'deep/a'):
    _write(tmp_path / f'{name}.parquet', 5, rows=2)
  settings = Settings(f'parquet:{tmp_path}', shard_records=4)
  manifest = prepare(settings, str(tmp_path / 'to'))
  assert manifest.count == 15 and [shard.records for shard in manifest.shards] == [4, 4, 4, 3]
  source = parquet.open_parquet(str(tmp_path), FieldSpec())
  assert list(source.names.values()) == ['a', 'b', 'deep/a']
  assert pickle.loads(pickle.dumps(source)) == source  # for reader processes


@pytest.mark.parametrize(
  'columns, fields, message',
  [
    ({'image': None}, {}, 'no image column image or jpg .*--image.*caption .string.'),
    ({'caption': None}, {}, 'no caption column caption or text or prompt.*--caption'),
    ({'caption': [[1, 2]] * 2}, {}, '--caption.*caption .list<'),
    ({'image': ['x.png'] * 2}, {}, 'no image column'),
    ({}, {'caption': 'annotation'}, 'no caption column annotation'),
    ({}, {'references': True, 'reference': 'before'}, 'no reference column before'),
  ],
)
def test_missing_columns_are_named(tmp_path, columns, fields, message):
  with pytest.raises(UserError, match=message) as error:
    _read(_write(tmp_path / 'a.parquet', 2, **columns), FieldSpec(**fields))
  assert '\n' not in str(error.value)


def test_classes_need_no_captions(tmp_path):
  (record,) = _read(_write(tmp_path / 'a.parquet', 1, caption=None), FieldSpec(captions=False))
  assert record.content.caption == ''


def test_invalid_and_inconsistent_files_are_named(tmp_path):
  _write(tmp_path / 'a.parquet', 2)
  _write(tmp_path / 'b.parquet', 2, caption=None, other=['x', 'y'])
  with pytest.raises(UserError, match='b.parquet has no column caption'):
    _read(tmp_path)
  _write(tmp_path / 'b.parquet', 2, caption=[1, 2])
  with pytest.raises(UserError, match='caption is int64 in .*b.parquet and string in .*a.parquet'):
    _read(tmp_path)
  (tmp_path / 'b.parquet').write_bytes(b'PAR1 nothing')
  with pytest.raises(UserError, match='b.parquet'):
    _read(tmp_path)


def test_without_pyarrow_the_cure_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match=r'pip install -e .\[prepare\]'):
    parquet.open_parquet(str(tmp_path), FieldSpec())
