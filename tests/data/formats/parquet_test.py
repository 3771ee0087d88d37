"""Parquet as the Hugging Face hub has it: columns, row groups, and what is missing."""

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
from vpe_jax.data.formats.folder import FieldSpec
from vpe_jax.data.inputs import RawRecord
from vpe_jax.data.preparing import Settings, prepare

ASKED = FieldSpec()


def _picture(number):
  content = io.BytesIO()
  Image.new('RGB', (4, 4), (number, 0, 0)).save(content, 'png')
  return content.getvalue()


def _write(path, count, rows=3, **columns):
  """A file of pictures as structs, with captions, in row groups."""
  values = {
    'image': [{'bytes': _picture(n), 'path': f'/etc/{n}.png'} for n in range(count)],
    'caption': [f' caption {n} 🦊' for n in range(count)],
  }
  table = pyarrow.table({k: v for k, v in (values | columns).items() if v is not None})
  pq.write_table(table, path, row_group_size=rows)
  return path


def _read(path, fields=ASKED, part=slice(None)):
  source = parquet.open_parquet(str(path), fields)
  places = list(source.places(path))
  assert len(places) == source.count()
  return list(source.read(places[part]))


@pytest.mark.parametrize('part', [slice(None), slice(1, 5), slice(4, 6), slice(70, 75)])
def test_any_run_of_rows_is_read(tmp_path, part):
  """Across row groups and batches, and from the middle of them."""
  path = _write(tmp_path / 'a.parquet', 80, rows=70)
  found = _read(path, part=part)
  numbers = range(80)[part]
  assert [one.content.id for one in found] == [f'a/{n}' for n in numbers]
  assert [one.content.caption for one in found] == [f'caption {n} 🦊' for n in numbers]
  assert [one.content.image for one in found] == [_picture(n) for n in numbers]


def test_plain_bytes_large_types_and_other_names(tmp_path):
  pictures = [_picture(n) for n in range(4)]
  path = _write(
    tmp_path / 'a.parquet',
    4,
    image=None,
    caption=None,
    after=pyarrow.array(pictures, pyarrow.large_binary()),
    before=pyarrow.array(pictures[::-1], pyarrow.binary()),
    annotation=pyarrow.array(list('abcd'), pyarrow.large_string()),
    language=['en'] * 4,
  )
  found = _read(path, FieldSpec(True, True, 'after', 'annotation', 'before'))
  assert [one.content.caption for one in found] == list('abcd')
  assert [one.content.image for one in found] == pictures
  assert [one.content.reference for one in found] == pictures[::-1]
  assert found[0].values == ({'language': 'en'},)


def test_rows_without_bytes_are_unusable_and_no_path_is_opened(tmp_path):
  (tmp_path / 'x.png').write_bytes(_picture(0))
  image = [
    {'bytes': None, 'path': str(tmp_path / 'x.png')},
    None,
    {'bytes': _picture(1), 'path': ''},
  ]
  path = _write(tmp_path / 'a.parquet', 3, image=image, caption=[None, 'x', None])
  found = _read(path)
  assert [isinstance(one, RawRecord) for one in found] == [False, False, True]
  assert 'row 0 of ' in found[0].reason and 'no bytes of a picture' in found[1].reason
  assert found[2].content.caption == ''


def test_text_that_is_not_utf_8_costs_its_row(tmp_path):
  texts = pyarrow.array([b'a', b'\xff\xfe', b'c', b'd'], pyarrow.binary())
  caption = pyarrow.Array.from_buffers(pyarrow.string(), 4, texts.buffers())
  found = _read(_write(tmp_path / 'a.parquet', 4, rows=4, caption=caption))
  assert [isinstance(one, RawRecord) for one in found] == [True, False, True, True]
  assert 'row 1 of' in found[1].reason and 'not UTF-8' in found[1].reason
  assert [one.content.caption for one in found if isinstance(one, RawRecord)] == ['a', 'c', 'd']


def test_a_damaged_row_group_costs_its_rows(tmp_path):
  path = _write(tmp_path / 'a.parquet', 6)
  content = bytearray(path.read_bytes())
  start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
  content[start : start + 40] = b'\xff' * 40
  path.write_bytes(content)
  found = _read(path)
  assert [isinstance(one, RawRecord) for one in found] == [False] * 3 + [True] * 3
  assert 'row group 0 of ' in found[0].reason


def test_files_are_prepared_in_order(tmp_path):
  (tmp_path / 'deep').mkdir()
  for name in ('b', 'a', 'deep/a'):
    _write(tmp_path / f'{name}.parquet', 5, rows=2)
  settings = Settings(f'parquet:{tmp_path}', shard_records=4)
  made = prepare(settings, str(tmp_path / 'to'))
  assert made.count == 15 and [shard.records for shard in made.shards] == [4, 4, 4, 3]
  source = parquet.open_parquet(str(tmp_path), FieldSpec())
  assert list(source.names.values()) == ['a', 'b', 'deep/a']
  assert pickle.loads(pickle.dumps(source)) == source  # It travels to reader processes.


@pytest.mark.parametrize(
  'columns, fields, message',
  [
    ({'image': None}, {}, 'has no image in a column image or jpg .*--image, of caption .string.'),
    ({'caption': None}, {}, 'has no caption in a column caption or text or prompt: name it with'),
    ({'caption': [['a', 'b']] * 2}, {}, r'--caption, of .*caption .list<'),
    ({'image': ['x.png'] * 2}, {}, 'has no image'),
    ({}, {'caption': 'annotation'}, 'has no caption in a column annotation'),
    ({}, {'references': True, 'reference': 'before'}, 'has no reference in a column before'),
  ],
)
def test_columns_that_are_missing_are_named(tmp_path, columns, fields, message):
  with pytest.raises(UserError, match=message) as error:
    _read(_write(tmp_path / 'a.parquet', 2, **columns), FieldSpec(**fields))
  assert '\n' not in str(error.value)


def test_captions_are_not_needed_for_classes(tmp_path):
  (one,) = _read(_write(tmp_path / 'a.parquet', 1, caption=None), FieldSpec(captions=False))
  assert one.content.caption == ''


def test_files_that_are_none_or_differ_are_named(tmp_path):
  _write(tmp_path / 'a.parquet', 2)
  _write(tmp_path / 'b.parquet', 2, caption=None, other=['x', 'y'])
  with pytest.raises(UserError, match='b.parquet has no column caption, which .*a.parquet has'):
    _read(tmp_path)
  (tmp_path / 'b.parquet').write_bytes(b'PAR1 nothing')
  with pytest.raises(UserError, match='b.parquet is no parquet file'):
    _read(tmp_path)


def test_without_pyarrow_the_cure_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match=r'pip install -e .\[prepare\]'):
    parquet.open_parquet(str(tmp_path), FieldSpec())
