"""Inputs: external sorting, folders, and file patterns."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from vpe_jax.contracts import UserError
from vpe_jax.data.formats.entries import FieldSpec
from vpe_jax.data.formats.folder import open_folder
from vpe_jax.data.inputs import RawRecord, matching_files, open_folder_input, sort


def test_external_sort_equals_sorted(tmp_path):
  names = [chr(letter) * count for letter in (0x41, 0x1F600, 0xD800, 0x2028) for count in (1, 2, 3)]
  entries = [([name, 'x', ''], {'n': n}, 'here') for n, name in enumerate(names * 3)]
  random.Random(0).shuffle(entries)
  expected = sorted(map(list, entries), key=lambda entry: entry[0])
  for run in (1, 5, 100):
    assert list(sort(iter(entries), tmp_path, run)) == expected
    assert not list(tmp_path.iterdir())
  assert list(sort([], tmp_path)) == []


def test_a_folder_input_has_the_order_of_the_folder_source(tmp_path):
  folder = tmp_path / 'in'
  (folder / 'deep').mkdir(parents=True)
  lines = []
  for name in ('b.png', 'deep/a.png', 'é.png', 'B.png', 'a b.png'):
    Image.new('RGB', (4, 4)).save(folder / name)
    lines += [{'file': name, 'caption': caption} for caption in ('two', 'one', 'two')]
  lines[0]['language'] = 'en'
  (folder / 'captions.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  source, folder_input = open_folder(str(folder)), open_folder_input(str(folder), FieldSpec())
  locations = list(folder_input.locations(tmp_path))
  assert json.loads(json.dumps(locations)) == [list(location) for location in locations]
  records = list(folder_input.read(locations))
  assert all(isinstance(record, RawRecord) for record in records)
  fields_of = lambda record: (record.id, record.caption, record.group)
  expected = [fields_of(record) for record in source]
  assert [fields_of(record.content) for record in records] == expected
  assert len(expected) == 10  # Duplicate lines are one record with the fields of both.
  (fields,) = [record.values for record in records if {'language': 'en'} in record.values]
  assert fields == ({'language': 'en'}, {})


def test_fields_may_have_other_names(tmp_path):
  for name in ('x.png', 'y.png'):
    Image.new('RGB', (4, 4)).save(tmp_path / name)
  line = {'file': 'none', 'caption': 'none', 'target': 'x.png', 'do': 'paint', 'source': 'y.png'}
  (tmp_path / 'captions.jsonl').write_text(json.dumps(line))
  fields = FieldSpec(True, True, 'target', 'do', 'source')
  folder_input = open_folder_input(str(tmp_path), fields)
  (record,) = folder_input.read(list(folder_input.locations(tmp_path)))
  assert record.content.caption == 'paint'
  assert record.content.reference == (tmp_path / 'y.png').read_bytes()
  folder_input = open_folder_input(str(tmp_path), FieldSpec(image='other'))
  (record,) = folder_input.read(list(folder_input.locations(tmp_path)))
  assert 'line 1 names no image: add "other"' in record.reason


def test_files_of_a_pattern_or_a_folder(tmp_path):
  for name in ('b/2.tar', 'a/1.tar', 'a/2.tar', 'a/x.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  assert list(matching_files(str(tmp_path), '.tar').values()) == ['a/1', 'a/2', 'b/2']
  assert list(matching_files(f'{tmp_path}/a/*.tar', '.tar').items()) == [
    (f'{tmp_path}/a/1.tar', '1'),
    (f'{tmp_path}/a/2.tar', '2'),
  ]
  assert list(matching_files(f'{tmp_path}/*/2.tar', '.tar').values()) == ['a/2', 'b/2']
  for pattern in ('nothing/*.tar', 'a/3.tar', 'b/*.parquet'):
    with pytest.raises(UserError, match='no files'):
      matching_files(f'{tmp_path}/{pattern}', '.tar')
