"""Tests of the training command: as a real process, and as a call on one's own pictures."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import t2i
from vpe_jax import main
from vpe_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[1]


def _main(*arguments, cwd=ROOT):
  return subprocess.run(
    [sys.executable, '-m', 'vpe_jax.main', *arguments],
    cwd=cwd,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '--config is missing: try --config=configs/t2i.py'),
    (['--config=configs/t2i.py:debgu'], "unknown preset 'debgu'; did you mean 'debug'?"),
    (['--config=configs/t2i.py', '--config.optim.lrr=1'], "did you mean 'lr'?"),
    (['--config=configs/t2i.py', 'extra'], "unexpected argument 'extra'"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
  done = _main(*arguments)
  assert done.returncode == 2
  assert message in done.stderr and 'Traceback' not in done.stderr
  assert len([line for line in done.stderr.splitlines() if line.startswith('error: ')]) == 1


def test_help_has_examples():
  done = _main('--help')
  assert 'python -m vpe_jax.main --config=configs/t2i.py' in done.stdout


def test_own_pictures_train_with_encoders_online_and_are_shown(tmp_path):
  folder = tmp_path / 'pictures'
  folder.mkdir()
  for i in range(9):
    colour = (28 * i, 255 - 28 * i, 90)
    Image.new('RGB', (40 + i, 50), colour).save(folder / f'{i}.png')
    (folder / f'{i}.txt').write_text(f'a plain card, number {i}')
  config = t2i.get_config('debug')
  config.steps = (1, 1)
  config.data.update(source=f'folder:{folder}', examples=0, encode='online')
  config.log.update(samples=2, evaluate=0)
  main.run(config.to_dict(), str(tmp_path / 'run'))
  plan, joint = metrics.read(tmp_path / 'run')
  assert (plan['stage'], joint['stage']) == ('plan', 'joint')
  shown = {f'sample/{who}/{what}' for who in ('own', 'truth_plan')
           for what in ('latent_distance', 'retrieval')}
  assert shown <= set(joint) and all(np.isfinite(joint[name]) for name in shown)
  with Image.open(tmp_path / 'run' / 'samples' / 'step_0000002.png') as sheet:
    assert sheet.width > 4 * 64 and np.asarray(sheet).std() > 1
