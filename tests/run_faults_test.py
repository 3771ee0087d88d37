"""Faults of machines and command lines: each is one line that names the cure, and leaves no mess.

A row is a fault: its name, what a user does, and a part of the error. Rows of full disks run where
a small file system can be mounted.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.outcomes import result_of
from vpe_jax.checkpoints import conversion, weights
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import CheckpointConfig
from vpe_jax.contracts import COUNTERS, UserError
from vpe_jax.sampling import images
from vpe_jax.training import config_file

# Python would print these with a traceback.
pytestmark = pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')

TOKENIZER = str(pathlib.Path(__file__).parent / 'golden' / 'llamagen_vq')
DISK_MEGABYTES = 1


@dataclasses.dataclass(frozen=True)
class Row:
  """A fault.

  Attributes:
    name: identifies the row.
    how: what the user does, in a folder.
    message: regular expression of the error.
  """

  name: str
  how: Callable[[pathlib.Path], object]
  message: str


def _set(**overrides: str) -> Callable[[pathlib.Path], object]:
  """Sets config fields of configs/t2i.py; two underscores are a dot."""
  fields = {key.replace('__', '.'): value for key, value in overrides.items()}
  return lambda folder: config_file.load('configs/t2i.py:debug', fields)


SETTINGS = [
  Row('no rate', _set(optim__lr='None'), "'optim.lr' must be float, not None"),
  Row('no decay', _set(optim__ema='None'), "'optim.ema' must be float, not None"),
  Row('no levels', _set(model__image__decoder='()'), "'model.image.decoder' .* it must be"),
  Row('no values', _set(optim__b1='()'), r"'optim.b1' is \(\): it must be one value"),
  Row('infinite base', _set(model__ar__rope_theta='1e999'), "'model.ar.rope_theta' is inf"),
  Row('infinite weight', _set(model__ce_end='1e999'), "'model.ce_end' is inf"),
  Row('no shift', _set(sample__shift='0'), "'sample.shift' is 0.0: it must be above 0"),
  Row('negative epsilon', _set(model__ar__eps='-1'), "'model.ar.eps' is -1.0: it must be above 0"),
  Row('another folder', _set(name='../../x'), "config.name is '../../x': .* a word"),
  Row('huge batch', _set(batch_size='9' * 20), 'config.batch_size is .*: at most'),
  Row('no devices', _set(mesh__fsdp='0'), "'mesh.fsdp' is 0: it must be -1 or at least 1"),
]


@pytest.mark.parametrize('row', SETTINGS, ids=lambda row: row.name)
def test_a_wrong_setting_is_refused(row, tmp_path):
  with pytest.raises(UserError, match=row.message) as error:
    row.how(tmp_path)
  assert '\n' not in str(error.value)


def _state(step: int, megabytes: float = 0.01) -> dict:
  values = np.random.default_rng(step).standard_normal(int(megabytes * 2**18 / 8), np.float32)
  params = {f'leaf_{n}': values + n for n in range(8)}
  return dict.fromkeys(COUNTERS, step) | {'params': params, 'opt_state': {}, 'ema': {}}


def _save(folder: pathlib.Path) -> None:
  store = Store(str(folder / FOLDER), CheckpointConfig())
  try:
    store.save(_state(1, 4 * DISK_MEGABYTES), {}, force=True)
    store.wait()
  finally:
    store.close()


def _fill(folder: pathlib.Path) -> None:
  """Fills the disk, folders included."""
  with open(folder / 'filler', 'wb', buffering=0) as file:
    try:
      while file.write(bytes(4096)):
        pass
    except OSError as error:
      assert 'No space' in str(error)


def _when_full(action: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], object]:
  def act(folder: pathlib.Path) -> None:
    _fill(folder)
    action(folder)

  return act


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
FULL = [
  Row('checkpoint', _save, 'cannot write a checkpoint to .*free some space'),
  Row(
    'import',
    lambda folder: conversion.import_weights('llamagen_vq', TOKENIZER, f'{folder}/x'),
    'cannot write a checkpoint to .*/x.*free some space',
  ),
  Row(
    'export',
    lambda folder: conversion.export_weights('siglip', 'assets:siglip', f'{folder}/x'),
    'cannot write .*/x: No space left on device; free some space',
  ),
  Row(
    'weight file',
    lambda folder: weights.save(f'{folder}/x.safetensors', _state(1, 4)['params'], {}),
    'cannot write .*x.safetensors: No space left on device; free some space',
  ),
  Row('image', _when_full(lambda folder: images.save_png(NOISE, folder / 'x.png')), 'free some'),
]


def _mounted(folder: pathlib.Path) -> bool:
  options = ['-t', 'tmpfs', '-o', f'size={DISK_MEGABYTES}m', 'tmpfs', str(folder)]
  try:
    return subprocess.run(['mount', *options], capture_output=True, check=False).returncode == 0
  except OSError:
    return False


def _can_mount() -> bool:
  with tempfile.TemporaryDirectory() as folder:
    if mounted := _mounted(pathlib.Path(folder)):
      subprocess.run(['umount', folder], check=True)
    return mounted


@pytest.fixture
def small_disk(tmp_path):
  folder = tmp_path / 'disk'
  folder.mkdir()
  assert _mounted(folder)
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)


@pytest.mark.parametrize('row', FULL if _can_mount() else [], ids=lambda row: row.name)
def test_a_full_disk_is_one_line_and_nothing_is_half_written(row, small_disk, caplog, capfd):
  with pytest.raises(UserError, match=row.message) as error:
    row.how(small_disk)
  assert '\n' not in str(error.value)
  gc.collect()  # Unretrieved exceptions are logged when their tasks are deleted.
  output = ''.join(capfd.readouterr())
  assert 'Traceback' not in output and 'Event loop' not in output and not caplog.records
  left = {path.name for path in small_disk.rglob('*') if path.is_file()}
  assert left <= {'filler'} and not (small_disk / 'x').exists()


def _cut(file: pathlib.Path) -> None:
  file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize('damage', [_cut, pathlib.Path.unlink])
def test_a_damaged_newest_checkpoint_is_one_warning(tmp_path, caplog, capfd, damage):
  store = Store(str(tmp_path / FOLDER), CheckpointConfig())
  for step in (1, 2):
    store.save(_state(step, 0.1), {}, force=True)
  store.close()
  for file in (tmp_path / FOLDER / '2').rglob('d/*'):
    damage(file)
  caplog.clear()
  record = weights.read_run(str(tmp_path), ('params/',))[1]
  gc.collect()
  assert record['step'] == 1
  (warning,) = caplog.records
  assert warning.levelno == logging.WARNING and 'trying the previous one' in warning.message
  assert '\n' not in warning.message and 'Traceback' not in ''.join(capfd.readouterr())


def test_a_clock_that_jumps_does_not_end_a_save(tmp_path, monkeypatch):
  start, calls = time.time(), iter(range(10**6))
  store = Store(str(tmp_path / FOLDER), CheckpointConfig())
  monkeypatch.setattr(time, 'time', lambda: start + 3600 * next(calls))  # an hour at each reading

  def save(step: int, finish: Callable[[], None]) -> None:
    store.save(_state(step), {}, force=True)
    finish()

  result_of(save, 1, store.wait)
  monkeypatch.setattr(time, 'time', lambda: start - 3600 * next(calls))
  result_of(save, 2, store.close)
  assert store.steps() == [1, 2]


def test_a_save_that_hangs_is_named(tmp_path, monkeypatch):
  class Hanging:
    """A save that is never finished."""

    def result(self, timeout):
      raise TimeoutError

  store = Store(str(tmp_path / FOLDER), CheckpointConfig())
  save = 'vpe_jax.checkpoints.store.ocp.save_checkpointables_async'
  monkeypatch.setattr(save, lambda *_, **__: Hanging())
  store.save(_state(1), {}, force=True)
  with pytest.raises(UserError, match='was not written .* within 60 minutes: .* another --workdir'):
    store.close()
