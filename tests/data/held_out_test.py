"""The held-out part of the user's data."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.preparing import Settings, prepare
from vpe_jax.data.sources import open_source
from vpe_jax.evaluation import heldout


def _write(folder, numbers, prefix=''):
  """Images of their own grey level, with captions that are their numbers."""
  folder.mkdir(exist_ok=True)
  for number in numbers:
    Image.new('L', (4, 4), number).save(folder / f'{prefix}{number:03d}.png')
    (folder / f'{prefix}{number:03d}.txt').write_text(f'{number}')


def _captions(source, split, **fields):
  config = DataConfig(source=source, **{'held_out': 0.25, **fields})
  records = list(open_source(config, split))
  assert {record.split for record in records} == {split}
  return [int(record.caption) for record in records]


def test_a_share_of_the_images_is_held_out_and_stays_when_images_are_added(tmp_path):
  source = f'folder:{tmp_path}/in'
  _write(tmp_path / 'in', range(100))
  train, held_out = (_captions(source, split) for split in ('train', 'combination'))
  assert 15 <= len(held_out) <= 35 and sorted(train + held_out) == list(range(100))
  # Copies under other names, which sort first, are in the same part as their originals.
  _write(tmp_path / 'in', range(0, 100, 2), prefix='_')
  _write(tmp_path / 'in', range(100, 150))
  later = _captions(source, 'combination')
  assert set(held_out) <= set(later) and not set(train) & set(later)
  assert later.count(min(h for h in held_out if h % 2 == 0)) == 2
  assert set(_captions(source, 'combination', held_out=0.1)) <= set(later)


def test_a_number_of_images_is_held_out(tmp_path):
  _write(tmp_path / 'in', range(30))
  source = f'folder:{tmp_path}/in'
  held_out = _captions(source, 'combination', held_out=7)
  assert len(held_out) == 7 and len(_captions(source, 'train', held_out=7)) == 23
  _write(tmp_path / 'in', held_out[:1], prefix='copy')
  assert len(_captions(source, 'combination', held_out=7)) in (7, 8)


def test_a_prepared_folder_has_the_same_split(tmp_path):
  _write(tmp_path / 'in', range(40))
  prepare(Settings(f'folder:{tmp_path}/in', shard_records=16), str(tmp_path / 'to'), workers=0)
  for split in ('train', 'combination'):
    assert _captions(f'folder:{tmp_path}/to', split) == _captions(f'folder:{tmp_path}/in', split)
  (tmp_path / 'to' / 'hashes.u64').unlink()
  with pytest.raises(UserError, match='hashes.u64 .*40 images.*data.held_out.*prepare'):
    _captions(f'folder:{tmp_path}/to', 'train')
  assert len(_captions(f'folder:{tmp_path}/to', 'train', held_out=0)) == 40


def test_every_folder_of_a_mixture_has_a_held_out_part(tmp_path):
  _write(tmp_path / 'a', range(40))
  _write(tmp_path / 'b', range(100, 120))
  mixed = {'root': str(tmp_path)}
  held_out = _captions('folders:a*3,b', 'combination', **mixed)
  assert len(set(held_out)) == len(held_out)  # not repeated
  train = _captions('folders:a*3,b', 'train', **mixed)
  assert not set(train) & set(held_out)
  assert set(train) | set(held_out) == {*range(40), *range(100, 120)}
  assert len(train) == 3 * (40 - sum(h < 100 for h in held_out)) + sum(t >= 100 for t in train)


def test_evaluators_know_whether_there_is_a_split(tmp_path):
  source = f'folder:{tmp_path}'
  assert heldout.has_split(DataConfig(source=source, held_out=0.1))
  assert not heldout.has_split(DataConfig(source=source))
  assert heldout.has_split(DataConfig(source='scenes'))


@pytest.mark.parametrize(
  'fields, split, message',
  [
    ({'held_out': -0.1}, 'train', 'data.held_out'),
    ({'held_out': 1.5}, 'train', 'data.held_out.* whole number'),
    ({'held_out': 0.001}, 'train', 'data.held_out=0.001 holds out 0 of the 8 records.*raise'),
    ({'held_out': 8}, 'train', 'data.held_out=8 holds out 8 of the 8 records.*lower'),
    ({'held_out': 0.5, 'source': 'scenes'}, 'train', 'data.held_out.*splits of its own'),
    ({'held_out': 0.5, 'source': 'tfds:x/train'}, 'train', 'data.held_out.*splits of its own'),
    ({}, 'combination', 'no held-out split; data.held_out'),
    ({'held_out': 0.5}, 'concept', 'no held-out split'),
  ],
)
def test_mistakes_are_named(tmp_path, fields, split, message):
  _write(tmp_path, range(8))
  with pytest.raises(UserError, match=message):
    open_source(DataConfig(**{'source': f'folder:{tmp_path}', **fields}), split)


def test_digests_name_what_changed_and_ignore_dates_and_places(tmp_path):
  """Digests of a folder, of a mixture, and of a prepared folder."""
  _write(tmp_path / 'in', range(6))
  prepare(Settings(f'folder:{tmp_path}/in'), str(tmp_path / 'to'))
  digests = lambda source, **fields: open_source(
    DataConfig(source=source, root=str(tmp_path), **fields)
  ).digests()
  before = digests(f'folder:{tmp_path}/in')
  assert list(before) == ['images', 'captions'] and before['images'].startswith('6 (')
  shutil.copytree(tmp_path / 'in', tmp_path / 'copy')
  assert digests(f'folder:{tmp_path}/copy') == before
  assert digests(f'folder:{tmp_path}/copy', held_out=2) == before  # its field is in the config
  (tmp_path / 'copy' / '003.txt').write_text('another caption')
  after = digests(f'folder:{tmp_path}/copy')
  assert (after['images'], after['captions'] == before['captions']) == (before['images'], False)
  (tmp_path / 'copy' / '003.png').unlink()
  assert digests(f'folder:{tmp_path}/copy')['images'].startswith('5 (')
  mixture = digests('folders:in*2,to')
  assert mixture['images of in'] == before['images']
  assert list(mixture) == ['images of in', 'captions of in', 'images and captions of to']
  manifest = json.loads((tmp_path / 'to' / 'prepared.json').read_text())
  hashes = np.fromfile(tmp_path / 'to' / 'hashes.u64', '<u8')
  assert len(hashes) == 6 and manifest['hashes_crc32'] is not None
