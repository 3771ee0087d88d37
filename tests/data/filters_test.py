"""Filters of the records of a folder: by language, and by the height of text in the image."""

from __future__ import annotations

import json

import pytest
from PIL import ExifTags, Image

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.filters import Filter
from vpe_jax.data.sources import open_source


def _folder(tmp_path, lines, size=(200, 100)):
  for line in lines:
    Image.new('RGB', size).save(tmp_path / line['file'])
  text = '\n'.join(json.dumps({'caption': 'a sign'} | line) for line in lines)
  (tmp_path / 'captions.jsonl').write_text(text)
  return f'folder:{tmp_path}'


def _ids(name, **fields):
  source = open_source(DataConfig(source=name, image_size=50, **fields))
  return [record.id.removeprefix('folder/').removesuffix('.png') for record in source]


def _text(height, words='sale'):
  return {'text': words, 'box': [5, 10, 60, 10 + height]}


def test_language_comes_from_the_field_or_from_the_letters(tmp_path):
  source = _folder(
    tmp_path,
    [
      {'file': 'a.png', 'language': 'en-US', 'caption': '标志'},
      {'file': 'b.png', 'language': 'zh'},
      {'file': 'c.png', 'caption': 'un café: 20 % off!'},
      {'file': 'd.png', 'caption': 'a sign 标志'},
      {'file': 'e.png', 'texts': [_text(9, '特价')]},
      {'file': 'f.png', 'language': '', 'texts': [_text(9)]},
    ],
  )
  assert _ids(source) == ['a', 'b', 'c', 'd', 'e', 'f']
  assert _ids(source, language='en') == ['a', 'c', 'f']
  with pytest.raises(UserError, match='line 3 .*"language".*data.language=zh'):
    _ids(source, language='zh')


def test_text_height_is_the_lowest_in_the_padded_image(tmp_path):
  """Images of 200 x 100 pixels shrink to a quarter."""
  source = _folder(
    tmp_path,
    [
      {'file': 'a.png', 'texts': [_text(32), _text(80)]},
      {'file': 'b.png', 'texts': [_text(80), _text(31.9)]},
      {'file': 'c.png', 'texts': []},
    ],
  )
  assert _ids(source, least_text_height=8) == ['a', 'c']
  assert _ids(source) == ['a', 'b', 'c']
  with pytest.raises(UserError, match='data.least_text_height'):
    _ids(_folder(tmp_path, [{'file': f'{n}.png', 'texts': [_text(9)]} for n in 'abc']),
          least_text_height=8)  # fmt: skip


def test_boxes_refer_to_the_upright_image(tmp_path):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  Image.new('RGB', (200, 100)).save(tmp_path / 'x.jpg', exif=exif)
  passes = lambda size: Filter(least_text_height=8, size=size).passes(
    {'texts': [_text(32)]}, '', tmp_path / 'x.jpg', 'here'
  )
  assert passes(50) and not passes(49)


@pytest.mark.parametrize(
  'line, fields, message',
  [
    ({}, {'least_text_height': 8}, 'line 1 .*"texts".*data.least_text_height=8'),
    ({'texts': [{'text': 'x'}]}, {'least_text_height': 8}, 'line 1: "texts"'),
    ({'texts': 3}, {'language': 'en'}, 'line 1: "texts"'),
    ({'texts': [{'text': 'x', 'box': [0, 9, 1, 2]}]}, {'least_text_height': 8}, '"texts"'),
    ({'language': 7}, {'language': 'en'}, 'line 1: "language" is 7'),
    ({'language': 'de'}, {'language': 'en'}, 'none of its 1 records passes data.language'),
  ],
)
def test_missing_and_malformed_fields_are_named_in_one_line(tmp_path, line, fields, message):
  with pytest.raises(UserError, match=message) as error:
    _ids(_folder(tmp_path, [{'file': 'x.png'} | line]), **fields)
  assert '\n' not in str(error.value)


def test_text_files_have_a_language_but_no_boxes(tmp_path):
  for name, caption in (('a', 'a sign'), ('b', '标志')):
    Image.new('RGB', (20, 10)).save(tmp_path / f'{name}.png')
    (tmp_path / f'{name}.txt').write_text(caption)
  assert _ids(f'folder:{tmp_path}', language='en') == ['a']
  with pytest.raises(UserError, match='image .*[ab].png .*"texts"'):
    _ids(f'folder:{tmp_path}', least_text_height=3)


def test_embedded_data_sets_have_no_filters():
  with pytest.raises(UserError, match='data.language.*config.data.source is words'):
    open_source(DataConfig(source='words', language='en'))
