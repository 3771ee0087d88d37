"""Tests of published weights: single files, shards, and damaged or malicious files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from vpe_jax import storage
from vpe_jax.checkpoints import sources
from vpe_jax.contracts import UserError

TENSORS = {
  'a': torch.arange(6.0).reshape(2, 3),
  'b': torch.arange(4.0).bfloat16(),
  'c': torch.zeros(0, 2),
}


def _shards(folder: Path) -> None:
  names = {'a': 'model-1.safetensors', 'b': 'model-2.safetensors', 'c': 'model-2.safetensors'}
  for name in set(names.values()):
    part = {key: tensor for key, tensor in TENSORS.items() if names[key] == name}
    safetensors.torch.save_file(part, folder / name)
  index = {'metadata': {}, 'weight_map': names}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


def _check(source: sources.Source) -> None:
  assert source.tensors.keys() == TENSORS.keys()
  for key, tensor in TENSORS.items():
    loaded = source.tensors[key]
    assert loaded.shape == tuple(tensor.shape)
    np.testing.assert_array_equal(loaded.read().astype(np.float32), tensor.float().numpy())


def test_single_file_and_its_config_are_read(tmp_path):
  safetensors.torch.save_file(TENSORS, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text('{"width": 3}')
  for name in (tmp_path, tmp_path / 'model.safetensors'):
    source = sources.open_source(str(name))
    _check(source)
    assert source.config == {'width': 3}


def test_remote_file_is_read_in_ranges(tmp_path, monkeypatch):
  path = epath.Path(tmp_path / 'model.safetensors')
  safetensors.torch.save_file(TENSORS, path)
  monkeypatch.setattr(storage, 'is_remote', lambda path: True)
  monkeypatch.setattr(epath.Path, 'read_bytes', None)
  tensors, _ = sources.open_file(path)
  _check(sources.Source(tmp_path, tensors, {}))


def test_shards_listed_by_an_index_are_read(tmp_path):
  _shards(tmp_path)
  source = sources.open_source(str(tmp_path))
  _check(source)
  assert source.config == {}


def test_pickled_files_are_read_without_safetensors(tmp_path):
  torch.save(TENSORS, tmp_path / 'pytorch_model.bin')
  _check(sources.open_source(str(tmp_path)))
  safetensors.torch.save_file({'other': torch.zeros(1)}, tmp_path / 'model.safetensors')
  assert sources.open_source(str(tmp_path)).tensors.keys() == {'other'}


@pytest.mark.parametrize('share', [0.0, 0.001, 0.5, 0.999])
def test_error_names_a_truncated_file(tmp_path, share):
  path = tmp_path / 'model.safetensors'
  safetensors.torch.save_file(TENSORS, path)
  data = path.read_bytes()
  path.write_bytes(data[: int(share * len(data))])
  with pytest.raises(UserError, match='model.safetensors.*get it again'):
    sources.open_source(str(path))


def test_missing_shard_or_tensor_of_an_index_is_detected(tmp_path):
  _shards(tmp_path)
  safetensors.torch.save_file({'b': TENSORS['b']}, tmp_path / 'model-2.safetensors')
  with pytest.raises(UserError, match="lacks 'c'"):
    sources.open_source(str(tmp_path))
  (tmp_path / 'model-2.safetensors').unlink()
  with pytest.raises(UserError, match='lacks model-2.safetensors'):
    sources.open_source(str(tmp_path))


def _write_file(path: Path, offsets: dict, size: int) -> Path:
  """Writes a file of float32 scalars at these offsets; all other header fields are valid."""
  header = {k: {'dtype': 'F32', 'shape': [1], 'data_offsets': o} for k, o in offsets.items()}
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(size))
  return path


@pytest.mark.parametrize(
  ('offsets', 'size', 'words'),
  [
    ({'a': [0, 4], 'b': [0, 4]}, 4, 'overlap'),
    ({'a': [0, 4], 'b': [2, 6]}, 6, 'overlap'),
    ({'a': [0, 4], 'b': [8, 12]}, 12, 'gaps'),
    ({'a': [0, 4]}, 8, 'belong to no tensor'),
    ({'a': [0, 4], 'b': [4, 8]}, 4, 'missing'),
    ({'a': [4, 0]}, 4, "overlap|doesn't match its shape"),
    ({'a': [0, '4']}, 4, 'its header is damaged'),
    ({'a': [0]}, 4, 'its header is damaged'),
    ({'a': None}, 4, 'its header is damaged'),
  ],
)
def test_invalid_offsets_are_refused(tmp_path, offsets, size, words):
  path = _write_file(tmp_path / 'model.safetensors', offsets, size)
  with pytest.raises(UserError, match=words) as error:
    sources.open_source(str(path))
  assert '\n' not in str(error.value) and 'codec' not in str(error.value)
  with pytest.raises(safetensors.SafetensorError):  # The reference library refuses it too.
    safetensors.deserialize(path.read_bytes())


@pytest.mark.parametrize('text', [b'{', b'[]', b'\xff\xfe', b'[' * 100_000, b'{"a": 1}'])
def test_damaged_header_is_a_one_line_error(tmp_path, text):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text)
  with pytest.raises(UserError, match=r'model.safetensors.*\(its header is damaged\)'):
    sources.open_source(str(path))


@pytest.mark.parametrize(
  ('index', 'words'),
  [
    ({'weight_map': {'a': '../other.safetensors'}}, 'outside its folder'),
    ({'weight_map': {'a': '/etc/passwd'}}, 'outside its folder'),
    ({'weight_map': {'a': 'deep/x.safetensors'}}, 'outside its folder'),
    ({'weight_map': {'a': 3}}, 'not a weight index'),
    ({'weight_map': ['a']}, 'not a weight index'),
    ([1], 'not a weight index'),
  ],
)
def test_malformed_index_is_a_one_line_error(tmp_path, index, words):
  safetensors.torch.save_file(TENSORS, tmp_path / 'model.safetensors')
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(UserError, match=words) as error:
    sources.open_source(str(tmp_path))
  assert '\n' not in str(error.value)


def test_deep_nesting_and_folders_in_place_of_files_are_one_line_errors(tmp_path):
  (tmp_path / 'model.safetensors').mkdir()
  with pytest.raises(UserError, match='a folder in place of model.safetensors'):
    sources.open_source(str(tmp_path))
  (tmp_path / 'model.safetensors').rmdir()
  safetensors.torch.save_file(TENSORS, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').mkdir()
  with pytest.raises(UserError, match='config.json.*irectory'):
    sources.open_source(str(tmp_path))
  (tmp_path / 'config.json').rmdir()
  for name in ('config.json', 'model.safetensors.index.json'):
    (tmp_path / name).write_text('[' * 100_000)
    with pytest.raises(UserError, match=name) as error:
      sources.open_source(str(tmp_path))
    assert '\n' not in str(error.value)
    (tmp_path / name).unlink()


def test_one_key_in_two_files_is_refused(tmp_path):
  for name in ('x.safetensors', 'y.safetensors'):
    safetensors.torch.save_file(TENSORS, tmp_path / name)
  with pytest.raises(UserError, match='in two files'):
    sources.open_source(str(tmp_path))


@pytest.mark.parametrize('name', ['config.json', 'config.yaml'])
@pytest.mark.parametrize('content', ['{', '[1]'])
def test_error_names_an_invalid_config(tmp_path, name, content):
  safetensors.torch.save_file(TENSORS, tmp_path / 'model.safetensors')
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=name) as error:
    sources.open_source(str(tmp_path))
  assert '\n' not in str(error.value)


def test_yaml_config_is_read_without_executing_code(tmp_path):
  safetensors.torch.save_file(TENSORS, tmp_path / 'model.safetensors')
  (tmp_path / 'config.yaml').write_text('ddconfig:\n  ch: 256\nn_embed: 131072\n')
  assert sources.open_source(str(tmp_path)).config == {'ddconfig': {'ch': 256}, 'n_embed': 131072}
  (tmp_path / 'config.yaml').write_text('a: !!python/object/apply:os.getcwd []\n')
  with pytest.raises(UserError, match='YAML'):
    sources.open_source(str(tmp_path))


def test_invalid_source_is_a_one_line_error(tmp_path):
  (tmp_path / 'readme.txt').write_text('')
  for name, words in (
    (str(tmp_path), 'contains no weights'),
    (str(tmp_path / 'readme.txt'), 'not a weight file'),
    (str(tmp_path / 'nothing'), 'no such file or folder'),
    ('nothing', 'not a hub id'),
  ):
    with pytest.raises(UserError, match=words) as error:
      sources.open_source(name)
    assert '\n' not in str(error.value)


def test_a_download_fetches_the_files_of_one_folder(monkeypatch, tmp_path):
  import huggingface_hub
  from huggingface_hub.utils import filter_repo_objects

  repository = ['a.pt', 'config.json', 'vae/a.safetensors', 'vae/config.json', 'vae/sub/b.pt']
  fetched = []

  def snapshot_download(repo, revision, allow_patterns, ignore_patterns):
    files = filter_repo_objects(
      repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
    )
    fetched.append(sorted(files))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  with pytest.raises(UserError, match='contains no weights'):
    sources.open_source('owner/name')
  assert fetched == [['config.json'], ['a.pt', 'config.json']]
  fetched.clear()
  (tmp_path / 'vae').mkdir()
  with pytest.raises(UserError, match='contains no weights'):
    sources.open_source('owner/name:vae')
  assert fetched == [['vae/a.safetensors', 'vae/config.json'], ['vae/config.json']]


def test_unreachable_hub_is_a_one_line_error(monkeypatch):
  import huggingface_hub

  def unreachable(*_, **__):
    raise OSError('no route to host\nmore details')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', unreachable)
  with pytest.raises(UserError, match='no route to host') as error:
    sources.open_source('owner/name')
  assert 'name the folder' in str(error.value) and '\n' not in str(error.value)
