"""Tests of reading PyTorch's pickled files without torch and without executing their code."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vpe_jax.checkpoints import pickles
from vpe_jax.contracts import UserError


class _Payload:
  """Calls os.system when it is unpickled, like malicious weights."""

  def __init__(self, command: str):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


def _tensors() -> dict[str, torch.Tensor]:
  generator = torch.Generator().manual_seed(0)
  base = torch.randn(4, 6, generator=generator)
  return {
    'plain': base,
    'transposed': base.T,
    'slice': base[1:3, ::2],
    'half': base.half(),
    'bfloat': base.bfloat16(),
    'ints': torch.arange(5),
    'scalar': torch.tensor(2.5),
    'empty': torch.zeros(0, 3),
    'parameter': torch.nn.Parameter(base[0]),
  }


def _save(folder: Path, content) -> Path:
  path = folder / 'weights.pth'
  torch.save(content, path)
  return path


@pytest.mark.parametrize('wrap', [lambda t: t, lambda t: {'state_dict': t, 'epoch': 3}])
def test_tensors_are_read_exactly(tmp_path, wrap):
  tensors = _tensors()
  loaded = pickles.read(_save(tmp_path, wrap(tensors)))
  assert loaded.keys() == tensors.keys()
  for name, tensor in tensors.items():
    tensor = tensor.detach()
    expected = tensor.float().numpy() if name == 'bfloat' else tensor.numpy()
    assert loaded[name].shape == expected.shape
    np.testing.assert_array_equal(loaded[name].read().astype(expected.dtype), expected)
  assert not loaded['plain'].read().flags.writeable


def test_payload_is_refused_and_not_executed(tmp_path):
  side_effect = tmp_path / 'side_effect'
  path = _save(tmp_path, {'a': torch.zeros(2), 'b': _Payload(f'touch {side_effect}')})
  with pytest.raises(UserError, match='refused') as error:
    pickles.read(path)
  assert 'system' in str(error.value) and 'safetensors' in str(error.value)
  assert not side_effect.exists()
  with pytest.raises(pickle.UnpicklingError):  # torch refuses it for the same reason.
    torch.load(path, weights_only=True)


def test_command_line_arguments_of_a_trainer_are_ignored(tmp_path):
  content = {'model': {'a': torch.ones(2)}, 'args': argparse.Namespace(lr=1e-4, gpus=[0, 1])}
  assert pickles.read(_save(tmp_path, content)).keys() == {'a'}


@pytest.mark.parametrize('content', [{'a': Path('x')}, {'f': print}])
def test_objects_other_than_tensors_and_containers_are_refused(tmp_path, content):
  with pytest.raises(UserError, match='refused'):
    pickles.read(_save(tmp_path, content))


@pytest.mark.parametrize('content', [[torch.zeros(2)], {'epoch': 1}, {1: torch.zeros(2)}])
def test_file_without_named_tensors_is_refused(tmp_path, content):
  with pytest.raises(UserError, match='weights.pth'):
    pickles.read(_save(tmp_path, content))


@pytest.mark.parametrize('share', [0.0, 0.3, 0.7, 0.99])
def test_error_names_a_truncated_file(tmp_path, share):
  path = _save(tmp_path, _tensors())
  data = path.read_bytes()
  path.write_bytes(data[: int(share * len(data))])
  with pytest.raises(UserError, match=str(path)):
    pickles.read(path)


def test_old_file_format_is_refused(tmp_path):
  path = tmp_path / 'weights.bin'
  torch.save(_tensors(), path, _use_new_zipfile_serialization=False)
  with pytest.raises(UserError, match='1.6'):
    pickles.read(path)


def test_flipped_bit_of_a_tensor_is_detected_on_read(tmp_path):
  path = _save(tmp_path, {'a': torch.arange(64.0), 'b': torch.ones(3)})
  data = bytearray(path.read_bytes())
  data[data.index(np.arange(64, dtype=np.float32).tobytes()) + 80] ^= 4
  path.write_bytes(data)
  tensors = pickles.read(path)
  assert tensors['b'].read().tolist() == [1, 1, 1]
  with pytest.raises(UserError, match='wrong checksum of .*data/0'):
    tensors['a'].read()


def test_flipped_bit_of_the_pickle_is_detected(tmp_path):
  path = _save(tmp_path, {'name': torch.ones(3)})
  path.write_bytes(path.read_bytes().replace(b'name', b'nane', 1))
  with pytest.raises(UserError, match='weights.pth.*PyTorch file') as error:
    pickles.read(path)
  assert '\n' not in str(error.value)


def test_error_names_a_missing_archive_member(tmp_path):
  path, short = _save(tmp_path, {'a': torch.arange(64.0)}), tmp_path / 'short.pth'
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(short, 'w') as new:
    for name in old.namelist():
      if not name.endswith('data/0'):
        new.writestr(name, old.read(name))
  with pytest.raises(UserError, match='lacks .*data/0'):
    pickles.read(short)['a'].read()


def test_truncated_storage_is_detected_on_read(tmp_path):
  path = _save(tmp_path, {'a': torch.arange(64.0)})
  short = tmp_path / 'short.pth'
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(short, 'w') as new:
    for name in old.namelist():
      data = old.read(name)
      new.writestr(name, data[:16] if name.endswith('data/0') else data)
  with pytest.raises(UserError, match='damaged'):
    pickles.read(short)['a'].read()
