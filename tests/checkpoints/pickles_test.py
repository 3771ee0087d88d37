"""PyTorch's pickled files, read without torch and without running what they say."""

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
  """Unpickles by calling os.system, as malicious weights do."""

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
def test_every_tensor_is_read_as_it_was_saved(tmp_path, wrap):
  tensors = _tensors()
  found = pickles.read(_save(tmp_path, wrap(tensors)))
  assert found.keys() == tensors.keys()
  for name, tensor in tensors.items():
    tensor = tensor.detach()
    wanted = tensor.float().numpy() if name == 'bfloat' else tensor.numpy()
    assert found[name].shape == wanted.shape
    np.testing.assert_array_equal(found[name].read().astype(wanted.dtype), wanted)
  assert not found['plain'].read().flags.writeable


def test_a_payload_is_refused_and_does_not_run(tmp_path):
  ran = tmp_path / 'ran'
  path = _save(tmp_path, {'a': torch.zeros(2), 'b': _Payload(f'touch {ran}')})
  with pytest.raises(UserError, match='refused') as caught:
    pickles.read(path)
  assert 'system' in str(caught.value) and 'safetensors' in str(caught.value)
  assert not ran.exists()
  with pytest.raises(pickle.UnpicklingError):  # The control: torch refuses it, for the same reason.
    torch.load(path, weights_only=True)


def test_a_trainers_arguments_are_passed_over(tmp_path):
  content = {'model': {'a': torch.ones(2)}, 'args': argparse.Namespace(lr=1e-4, gpus=[0, 1])}
  found = pickles.read(_save(tmp_path, content))
  assert found.keys() == {'a'}


@pytest.mark.parametrize('content', [{'a': Path('x')}, {'f': print}])
def test_anything_but_tensors_and_containers_is_refused(tmp_path, content):
  with pytest.raises(UserError, match='refused'):
    pickles.read(_save(tmp_path, content))


@pytest.mark.parametrize('content', [[torch.zeros(2)], {'epoch': 1}, {1: torch.zeros(2)}])
def test_a_file_without_named_tensors_says_so(tmp_path, content):
  with pytest.raises(UserError, match='no tensors by name'):
    pickles.read(_save(tmp_path, content))


@pytest.mark.parametrize('share', [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(tmp_path, share):
  path = _save(tmp_path, _tensors())
  data = path.read_bytes()
  path.write_bytes(data[: int(share * len(data))])
  with pytest.raises(UserError, match=str(path)):
    pickles.read(path)


def test_an_old_pickle_is_refused(tmp_path):
  path = tmp_path / 'weights.bin'
  torch.save(_tensors(), path, _use_new_zipfile_serialization=False)
  with pytest.raises(UserError, match='1.6'):
    pickles.read(path)


def test_a_flipped_bit_of_a_tensor_is_noticed_when_it_is_read(tmp_path):
  path = _save(tmp_path, {'a': torch.arange(64.0), 'b': torch.ones(3)})
  data = bytearray(path.read_bytes())
  data[data.index(np.arange(64, dtype=np.float32).tobytes()) + 80] ^= 4
  path.write_bytes(data)
  found = pickles.read(path)
  assert found['b'].read().tolist() == [1, 1, 1]
  with pytest.raises(UserError, match='wrong checksum of .*data/0'):
    found['a'].read()


def test_a_flipped_bit_of_the_description_is_noticed(tmp_path):
  path = _save(tmp_path, {'name': torch.ones(3)})
  path.write_bytes(path.read_bytes().replace(b'name', b'nane', 1))
  with pytest.raises(UserError, match='no whole PyTorch file') as caught:
    pickles.read(path)
  assert '\n' not in str(caught.value)


def test_a_member_that_is_not_there_is_named(tmp_path):
  path, short = _save(tmp_path, {'a': torch.arange(64.0)}), tmp_path / 'short.pth'
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(short, 'w') as new:
    for name in old.namelist():
      if not name.endswith('data/0'):
        new.writestr(name, old.read(name))
  with pytest.raises(UserError, match='lacks .*data/0'):
    pickles.read(short)['a'].read()


def test_bytes_that_are_missing_are_noticed_when_a_tensor_is_read(tmp_path):
  path = _save(tmp_path, {'a': torch.arange(64.0)})
  short = tmp_path / 'short.pth'
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(short, 'w') as new:
    for name in old.namelist():
      data = old.read(name)
      new.writestr(name, data[:16] if name.endswith('data/0') else data)
  with pytest.raises(UserError, match='damaged'):
    pickles.read(short)['a'].read()
