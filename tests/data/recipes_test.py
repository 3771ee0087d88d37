"""Several folders as one source, up-sampled; mixtures of the shipped configs."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from configs import edit, t2i, text_rendering
from tests.small_pipelines import small_pipeline
from vpe_jax import systems
from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data import recipes
from vpe_jax.data.preparing import Settings, prepare
from vpe_jax.data.sources import open_source
from vpe_jax.evaluation import heldout


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Two folders of edits: 2 in one, 3 in the other."""
  root = tmp_path_factory.mktemp('sets')
  for name, colours in (('warm', ('red', 'orange')), ('cold', ('blue', 'navy', 'cyan'))):
    (root / name).mkdir()
    lines = []
    for colour in colours:
      Image.new('RGB', (8, 6), colour).save(root / name / f'{colour}.png')
      line = {'file': f'{colour}.png', 'caption': f'make it {colour}', 'reference': f'{colour}.png'}
      lines.append(json.dumps(line | {'language': 'zh' if colour == 'navy' else 'en'}))
    (root / name / 'captions.jsonl').write_text('\n'.join(lines))
  return root


def _open(root, recipe, **data):
  return open_source(DataConfig(source=f'folders:{recipe}', root=str(root), **data))


def test_folders_are_concatenated_and_repeated(root):
  source = _open(root, 'warm*3, cold', source_images=True)
  records = list(source)
  captions = [record.caption for record in records]
  warm, cold = ['make it orange', 'make it red'], ['make it blue', 'make it cyan', 'make it navy']
  assert captions == 3 * warm + cold
  assert records[0].id == 'warm/folder/orange.png' and records[8].id == 'cold/folder/navy.png'
  assert all(record.reference is not None for record in records)
  assert records[6].image.render(8)[4, 4].tolist() == [0, 0, 255]
  for index in (-1, 9):
    with pytest.raises(IndexError):
      source[index]


def test_filters_apply_to_every_folder(root):
  source = _open(root, 'warm,cold*2', language='en')
  assert len(source) == 2 + 2 * 2
  assert all('navy' not in source[index].caption for index in range(len(source)))


def test_a_folder_may_have_its_own_filter(root):
  captions = lambda **data: [record.caption for record in _open(root, 'warm,cold', **data)]
  english = {'cold': {'language': 'en'}}
  assert len(captions(filters=english)) == 4 and 'make it navy' not in captions(filters=english)
  # It replaces the common filter, which the other folders have.
  assert len(captions(filters={'cold': {}}, language='en')) == 5
  assert captions(filters={'warm': {}}, language='en')[2:] == ['make it blue', 'make it cyan']
  with pytest.raises(UserError, match='"texts".*data.filters.warm.least_text_height=8'):
    captions(filters={'warm': {'least_text_height': 8}})


def test_a_prepared_folder_is_checked_against_its_own_filter(root, tmp_path):
  settings = Settings(f'folder:{root}/cold', language='en')
  prepare(settings, str(tmp_path / 'cold'))
  shutil.copytree(root / 'warm', tmp_path / 'warm')
  assert len(_open(tmp_path, 'warm,cold', filters={'cold': {'language': 'en'}})) == 4
  for data in ({}, {'filters': {'warm': {'language': 'en'}}}):
    with pytest.raises(UserError, match=r"language='en' \(data.language is ''\)"):
      _open(tmp_path, 'warm,cold', **data)
  with pytest.raises(UserError, match=r"\(data.filters.cold.language is 'zh'\)"):
    _open(tmp_path, 'warm,cold', filters={'cold': {'language': 'zh'}})


def test_an_epoch_repeats_upsampled_records(root):
  config = DataConfig(source='folders:warm*2,cold', root=str(root), image_size=8, text_length=8)
  pipeline = small_pipeline(config, seed=3)
  epoch = [pipeline.index_at(position) for position in range(len(pipeline))]
  assert sorted(epoch) == list(range(7)) and epoch != sorted(epoch)
  assert not heldout.has_split(config)


@pytest.mark.parametrize(
  'recipe, data, message',
  [
    ('', {}, 'different names'),
    ('warm*0', {}, 'different names'),
    ('warm*x,cold', {}, 'different names'),
    ('warm,cold,warm*2', {}, 'different names'),
    ('warm,,cold', {}, 'different names'),
    ('warm,hot', {}, 'data set hot is missing.*captions.jsonl.*"caption"'),
    ('nhr_edit*3', {'source_images': True}, 'data set NHR-Edit is missing.*/nhr_edit.*"reference"'),
    ('warm,cold', {'examples': 4}, 'data.examples=4'),
    ('warm,cold', {'filters': {'wam': {'language': 'en'}}}, "filters.wam.*mean 'warm'"),
    ('warm,cold', {'filters': {'warm': {'languages': 'en'}}}, 'filters.warm has languages'),
    ('warm,cold', {'filters': {'warm': {'least_text_height': '8'}}}, 'filters.warm has least_te'),
    ('warm,cold', {'filters': {'warm': {'least_text_height': -8}}}, 'filters.warm has .*from 0'),
    ('warm,cold', {'filters': {'warm': 'en'}}, "filters.warm is 'en', not a section"),
  ],
)
def test_mistakes_are_named(root, recipe, data, message):
  with pytest.raises(UserError, match=message) as error:
    _open(root, recipe, **data)
  assert '\n' not in str(error.value)


def test_mixtures_of_the_shipped_configs():
  """Names and repetitions; missing data sets are named."""
  expected = {
    edit: {'nhr_edit': 3, 'unic_edit': 1, 'sharegpt_4o_image': 5, 'pico_banana': 4},
    text_rendering: {'text_atlas': 1, 'anyword': 1},
    t2i: {'blip3o': 1, 'text_atlas': 1, 'anyword': 1},
  }
  for config_file, entries in expected.items():
    config = systems.build(config_file.get_config('paper').to_dict()).config
    assert recipes.parse(config.data.source) == entries
    assert set(entries) <= set(recipes.TITLES)
    with pytest.raises(UserError, match='data set .* is missing.*data/'):
      open_source(config.data)
