"""Data sets of TensorFlow Datasets, written here by TFDS itself and read without TensorFlow."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.small_pipelines import small_pipeline
from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.formats import tfds as tfds_format
from vpe_jax.data.preparing import Settings, prepare
from vpe_jax.data.records import BadRecord
from vpe_jax.data.sources import open_source
from vpe_jax.evaluation import heldout

NAMES = ('cat', 'dog')


def _png(number, ending='png'):
  levels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
  content = io.BytesIO()
  Image.fromarray(levels).save(content, ending)
  return content.getvalue()


class _Animals(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Labelled images; a second version has captions instead."""

  name = 'animals'
  code_path = None  # Otherwise TFDS imports an optional package to find it.
  VERSION = tfds.core.Version('1.2.0')
  SUPPORTED_VERSIONS = [tfds.core.Version('1.10.0')]

  def _info(self):
    kind = {'caption': tfds.features.Text()}
    if str(self.version) == '1.2.0':
      kind = {'label': tfds.features.ClassLabel(names=NAMES), 'id': tfds.features.Text()}
    features = tfds.features.FeaturesDict({'image': tfds.features.Image(), **kind})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'train': self._examples(12), 'test': self._examples(3)}

  def _examples(self, count):
    for number in range(count):
      values = {'label': number % 2, 'id': 'x', 'caption': f' fox 🦊 {number}'}
      values = {name: values[name] for name in self.info.features if name != 'image'}
      ending = ('png', 'jpeg')[number % 3 == 0]
      yield number, {'image': io.BytesIO(_png(number, ending)), **values}

  def _generate_examples(self):
    return self._examples(0)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A data_dir with two versions of a data set."""
  root = tmp_path_factory.mktemp('tfds')
  for version in ('1.2.0', '1.10.0'):
    builder = _Animals(data_dir=str(root), version=version, file_format='array_record')
    builder.download_and_prepare()
  return root


def _open(root, name, **fields):
  return open_source(DataConfig(source=f'tfds:{name}', root=str(root), **fields))


def _rendered(source):
  return {source[i].image.render(16).tobytes() for i in range(len(source))}


def test_labels_are_groups(root):
  source = _open(root, 'animals:1.2.0/train', prompt_field='group')
  assert len(source) == 12
  assert sorted(source[i].group for i in range(12)) == ['cat'] * 6 + ['dog'] * 6
  pairs = {(source[i].group, source[i].image.content) for i in range(12)}
  assert pairs == {(NAMES[n % 2], _png(n, ('png', 'jpeg')[n % 3 == 0])) for n in range(12)}
  assert len({source[i].id for i in range(12)}) == 12
  assert {source[i].caption for i in range(12)} == {''}
  for index in (-1, 12):
    with pytest.raises(IndexError):
      source[index]


@pytest.mark.parametrize('needs_label', [False, True])
def test_records_without_a_label(root, monkeypatch, needs_label):
  """TFDS gives them the label -1, as in test splits whose labels are secret."""
  source = _open(root, 'animals:1.2.0/train', prompt_field='group')
  values = [{'image': _png(0), 'label': np.int64(-1)}]
  monkeypatch.setattr(tfds_format, '_reader', lambda *_: values)
  source = dataclasses.replace(source, needs_label=needs_label)
  if needs_label:
    with pytest.raises(BadRecord, match='record 0 of .*label=-1'):
      source[0]
  else:
    assert source[0].group == 'tfds'


def test_errors_of_many_lines_are_cut(root, monkeypatch):
  def fail(*_):
    raise ValueError('first line\nsecond line')

  source = _open(root, 'animals')
  monkeypatch.setattr(tfds_format, '_reader', fail)
  with pytest.raises(BadRecord, match='first line') as error:
    source[0]
  assert '\n' not in str(error.value)


def test_defaults_are_the_newest_version_and_the_split_train(root):
  """1.10.0 is newer than 1.2.0."""
  source = _open(root, 'animals')
  assert {source[i].caption for i in range(12)} == {f'fox 🦊 {n}' for n in range(12)}
  assert len(_open(root, 'animals/test')) == 3
  assert len(_open(root, 'animals/1.10.0/test')) == 3
  part = _open(root, 'animals/train[:25%]')
  assert len(part) == 3 and part[0].caption == source[0].caption
  assert not heldout.has_split(DataConfig(source='tfds:animals'))


@pytest.mark.parametrize('workers', [0, 1])
def test_batches_for_a_class_conditional_model(root, workers):
  config = DataConfig(
    source='tfds:animals/1.2.0',
    root=str(root),
    prompt_field='group',
    tokenizer='classes:cat,dog',
    image_size=8,
    text_length=2,
    workers=workers,
  )
  with small_pipeline(config, seed=1).batches(0, 12) as batches:
    batch = next(batches)
  assert batch.inputs['image'].shape == (12, 8, 8, 3)
  assert len(np.unique(batch.inputs['text'], axis=0)) == 2


def test_a_prepared_copy_has_the_same_records(root, tmp_path):
  settings = Settings('tfds:animals/1.2.0/train', str(root), captions=False, shard_records=5)
  prepare(settings, str(tmp_path / 'to'))
  ours, theirs = (
    open_source(DataConfig(source=source, root=str(root), prompt_field='group'))
    for source in (f'folder:{tmp_path}/to', 'tfds:animals/1.2.0/train')
  )
  assert len(ours) == len(theirs) == 12
  for index in range(12):
    assert (ours[index].id, ours[index].group) == (theirs[index].id, theirs[index].group)
    np.testing.assert_array_equal(ours[index].image.render(8), theirs[index].image.render(8))


def test_a_source_pickles_small_and_needs_no_tensorflow(root):
  source = _open(root, 'animals')
  assert len(pickle.dumps(source)) < 1000
  code = (
    'import sys\nfrom vpe_jax.config import DataConfig\n'
    'from vpe_jax.data.sources import open_source\n'
    f'source = open_source(DataConfig(source="tfds:animals", root="{root}"))\n'
    'source[3].image.render(8)\n'
    'assert not {"tensorflow", "cv2"} & set(sys.modules)'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_stamps_change_with_the_files(root, tmp_path):
  folder = tmp_path / 'animals' / '1.10.0'
  folder.mkdir(parents=True)
  for path in (root / 'animals' / '1.10.0').iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  source = _open(tmp_path, 'animals')
  before = list(source.stamps())
  assert before == list(_open(tmp_path, 'animals').stamps()) and len(before) == 4
  (shard,) = folder.glob('*train*')
  shard.write_bytes(shard.read_bytes() + b'x')
  assert list(source.stamps()) != before


@pytest.mark.parametrize(
  'name, fields, message',
  [
    ('cifar10', {}, 'tfds:cifar10 is not in .*download_and_prepare'),
    ('animals/one/train', {}, 'is not in'),
    ('animals/validation', {}, 'split validation .*train'),
    ('animals/train[', {}, 'has no split'),
    ('../animals', {}, 'tfds:../animals'),
    ('/train', {}, 'is not in'),
    ('animals/1.2.0', {}, 'no caption .*data.prompt_field=group'),
    ('animals/1.10.0', {'prompt_field': 'group'}, 'no feature label'),
    ('animals', {'language': 'en'}, 'data.language'),
    ('animals', {'source_images': True}, 'no source images'),
  ],
)
def test_mistakes_are_one_line(root, name, fields, message):
  with pytest.raises(UserError, match=message) as error:
    _open(root, name, **fields)
  assert '\n' not in str(error.value)


def _copy(root, to, edit, name='dataset_info.json'):
  folder = to / 'animals' / '1.10.0'
  folder.mkdir(parents=True)
  for path in (root / 'animals' / '1.10.0').iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  (folder / name).write_text(edit((folder / name).read_text()))


@pytest.mark.parametrize(
  'name, edit, message',
  [
    ('dataset_info.json', lambda t: t.replace('array_record', 'tfrecord'), 'tfrecord'),
    ('dataset_info.json', lambda t: t[:40], '1.10.0 is not a data set'),
    ('features.json', lambda t: t[:40], '1.10.0 is not a data set'),
    (
      'features.json',
      lambda t: t.replace('tensorflow_datasets.core.features.text_feature', 'antigravity'),
      'features.json names antigravity.Text',
    ),
  ],
)
def test_unreadable_data_sets_are_named(root, tmp_path, name, edit, message):
  _copy(root, tmp_path, edit, name)
  with pytest.raises(UserError, match=message) as error:
    _open(tmp_path, 'animals')
  assert '\n' not in str(error.value)
  assert 'antigravity' not in sys.modules


def test_damaged_records_are_named(root, tmp_path):
  _copy(root, tmp_path, lambda text: json.dumps(json.loads(text)))
  (shard,) = (tmp_path / 'animals' / '1.10.0').glob('*train*')
  shard.write_bytes(b'x' * 1000)
  with pytest.raises(UserError, match='record 3 of .*1.10.0 .train.'):
    _open(tmp_path, 'animals')[3]


def test_a_folder_without_a_version(tmp_path):
  (tmp_path / 'animals' / 'config').mkdir(parents=True)
  with pytest.raises(UserError, match='no version .* config'):
    _open(tmp_path, 'animals')
