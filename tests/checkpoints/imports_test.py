"""Tests of imports: folders that are written once, and sources that are out of reach or damaged."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from vpe_jax.checkpoints import imports, store, weights
from vpe_jax.contracts import PretrainedWeights, UserError

PARAMS = {'a': np.ones(3, np.float32)}


def test_a_folder_with_checkpoints_is_refused_and_kept(tmp_path):
  imports.write_checkpoint(str(tmp_path / 'run'), PARAMS, {'seed': 1})
  with pytest.raises(UserError, match='exists'):
    imports.write_checkpoint(str(tmp_path / 'run'), PARAMS, {'seed': 2})
  params, metadata = weights.load(str(tmp_path / 'run'))
  np.testing.assert_array_equal(params['a'], PARAMS['a'])
  assert metadata['config'] == '{"seed": 1}'


@pytest.mark.parametrize('existing', [[], ['notes.txt']])
def test_a_failed_save_deletes_only_what_it_wrote(tmp_path, monkeypatch, existing):
  folder = tmp_path / 'run'
  for name in existing:
    folder.mkdir()
    (folder / name).touch()

  def full(self, *_, **__):
    self._directory.mkdir(parents=True)
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(store.Store, 'save', full)
  with pytest.raises(UserError, match='No space left'):
    imports.write_checkpoint(str(folder), PARAMS, {})
  files = [path.name for path in folder.iterdir()] if folder.exists() else []
  assert files == existing and folder.exists() == bool(existing)


@pytest.mark.parametrize('source', ['gs://bucket/x', 's3://bucket/x', 'unknown://x'])
def test_sources_out_of_reach_are_one_line_errors(monkeypatch, source):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(UserError, match=f'{source}.*out of reach'):
    imports.network(PretrainedWeights('siglip', source, None), lambda tree: tree)


def test_weights_of_another_family_are_refused():
  with pytest.raises(UserError, match='family siglip, not clip: name weights of clip'):
    imports.read('assets:siglip', 'clip')


@pytest.mark.parametrize(
  'metadata, message', [({'config': '{'}, 'damaged'), ({}, 'have no config')]
)
def test_a_missing_or_damaged_config_is_a_one_line_error(tmp_path, metadata, message):
  file = str(tmp_path / 'a.safetensors')
  weights.save(file, PARAMS, metadata)
  with pytest.raises(UserError, match=message):
    imports.read(file, 'siglip')
