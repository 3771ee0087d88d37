"""Training as a user runs it: real processes that are killed, stopped by a signal, and misused."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import commands
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import CheckpointConfig
from vpe_jax.training import metrics

CONFIG = '--config=configs/t2i.py:debug'
# More steps than `debug` has, so that a slow watcher still kills at the intended step.
PLAN, JOINT, EVERY = 30, 40, 10
LENGTH = (
  f'--config.steps=({PLAN}, {JOINT})',
  f'--config.checkpoint.every={EVERY}',
  '--config.evals.sample_grid.every=0',
  '--config.evals.heldout.every=0',
)
SPEEDS = re.compile(r'time|_per_s|mfu|data_wait')

pytestmark = pytest.mark.slow


class Process(commands.Command):
  """A front door in a process of its own, on one device by default."""

  def __init__(self, door: str, *arguments: str, log: Path, devices: int = 1):
    self.log = log
    log.unlink(missing_ok=True)
    # Of the flags of other tests only the one that makes no program slower: these runs are long.
    flags = [flag for flag in os.environ['XLA_FLAGS'].split() if 'emitters' in flag]
    flags.append(f'--xla_force_host_platform_device_count={devices}')
    env = {'XLA_FLAGS': ' '.join(flags)}
    super().__init__(f'vpe_jax.{door}', *arguments, stdout=log, env=env)

  def until(self, predicate: Callable[[], bool]) -> None:
    """Returns as soon as the predicate is true, while the process is running."""
    deadline = time.monotonic() + commands.TIMEOUT
    while not predicate():
      assert self.poll() is None, f'ended too early:\n{self.text()}'
      assert time.monotonic() < deadline, f'timed out:\n{self.text()}'
      time.sleep(0.001)

  def text(self) -> str:
    """Its output."""
    return self.log.read_text()


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Process]:
  """Starts `vpe_jax.main` on a workdir; the test ends processes that still run."""
  count = iter(range(100))

  def start_main(workdir: Path, *arguments: str) -> Process:
    log = tmp_path / f'log-{next(count)}.txt'
    process = Process('main', CONFIG, f'--workdir={workdir}', *LENGTH, *arguments, log=log)
    request.addfinalizer(process.kill)
    return process

  return start_main


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The workdir of an uninterrupted run."""
  folder = tmp_path_factory.mktemp('finished')
  process = Process('main', CONFIG, f'--workdir={folder / "run"}', *LENGTH, log=folder / 'log.txt')
  try:
    assert process.wait() == 0, process.text()
  finally:
    process.kill()
  return folder / 'run'


def _records(workdir: Path) -> list[dict[str, Any]]:
  return metrics.read(workdir)


def _has(workdir: Path, stage: str, stage_step: int) -> bool:
  return any(r['stage'] == stage and r['stage_step'] >= stage_step for r in _records(workdir))


def _saved(workdir: Path) -> list[int]:
  return Store(str(workdir / FOLDER), CheckpointConfig()).steps()


def _unfinished(workdir: Path) -> set[tuple[str, int]]:
  """Checkpoints that are being written: names and inodes of their folders."""
  folders = (workdir / FOLDER).glob('*.orbax-checkpoint-tmp*')
  return {(path.name, path.stat().st_ino) for path in folders if path.exists()}


def _kill_while_saving(process: Process, workdir: Path) -> None:
  """Sends SIGKILL during a save; SIGSTOP comes first, to make sure that the save is unfinished."""
  before = _unfinished(workdir)
  while True:
    process.until(lambda: bool(_unfinished(workdir) - before))
    process.send(signal.SIGSTOP)
    if _unfinished(workdir) - before:
      process.send(signal.SIGKILL)
      return
    process.send(signal.SIGCONT)


def _resumed(process: Process) -> int:
  """The step after which a process resumed, from its log."""
  message = re.search(r'run: resumes after step (\d+)', process.text())
  assert message, process.text()
  return int(message[1])


def _assert_same_run(workdir: Path, reference: Path) -> None:
  """Checks that the last checkpoints are bitwise equal, and the metrics of every step equal."""
  (ours, meta), (expected, expected_meta) = (
    Store(str(run / FOLDER), CheckpointConfig()).read(lambda paths: paths)
    for run in (workdir, reference)
  )
  for counter in ('stage', 'step', 'stage_step', 'examples_seen'):
    assert meta[counter] == expected_meta[counter]
  assert meta['step'] == PLAN + JOINT
  assert ours.keys() == expected.keys()
  assert {path.split('/')[0] for path in ours} >= {'params', 'opt_state', 'ema'}
  for path, leaf in expected.items():
    assert ours[path].dtype == leaf.dtype and ours[path].shape == leaf.shape, path
    assert ours[path].tobytes() == leaf.tobytes(), f'{path} differs'

  records, expected_records = _records(workdir), _records(reference)
  assert [r['step'] for r in records] == list(range(1, PLAN + JOINT + 1))
  for pair in zip(records, expected_records, strict=True):
    numbers = [{k: v for k, v in r.items() if not SPEEDS.search(k)} for r in pair]
    assert numbers[0] == numbers[1]


def test_an_uninterrupted_run_writes_curves_and_the_loss_falls(finished: Path) -> None:
  assert (finished / 'curves.png').stat().st_size > 1000
  losses = [r['loss'] for r in _records(finished) if r['stage'] == 'plan']
  assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])


def test_samples_follow_a_file_of_prompts(finished: Path, tmp_path: Path) -> None:
  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('a red circle\n\ntwo green pears\n')
  log, out = tmp_path / 'log.txt', tmp_path / 'out'
  common = (f'--workdir={finished}', f'--prompts={prompts}', '--n=2', '--steps=2')
  files = Process('sample', *common, f'--out={out}/', log=log)
  assert files.wait() == 0, files.text()
  images = [Image.open(path) for path in sorted(out.iterdir())]
  metadata = [(image.text['prompt'], image.text['index']) for image in images]
  assert metadata == [(p, str(i)) for p in ('a red circle', 'two green pears') for i in range(2)]
  assert all(image.size == (64, 64) and image.text['generated'] == 'true' for image in images)
  plain = Process(
    'sample', *common, '--weights=raw', '--no_metadata', f'--out={tmp_path / "x.png"}', log=log
  )
  assert plain.wait() == 0, plain.text()
  with Image.open(tmp_path / 'x.png') as sheet:
    assert sheet.width > 2 * 64 and sheet.height > 2 * 64 and not sheet.text


def test_a_folder_of_images_trains_online_and_has_a_sample_grid(tmp_path: Path) -> None:
  folder, run = tmp_path / 'images', tmp_path / 'run'
  folder.mkdir()
  for i in range(9):
    Image.new('RGB', (40 + i, 50), (28 * i, 255 - 28 * i, 90)).save(folder / f'{i}.png')
    (folder / f'{i}.txt').write_text(f'a plain card, number {i}')
  fields = {
    'steps': '(1, 1)',
    'data.source': f'folder:{folder}',
    'data.examples': 0,
    'data.encode': 'online',
    'evals.sample_grid.every': 2,
    'evals.heldout.every': 0,
  }
  changes = [f'--config.{name}={value}' for name, value in fields.items()]
  process = Process('main', CONFIG, f'--workdir={run}', *changes, log=tmp_path / 'log.txt')
  assert process.wait() == 0, process.text()
  plan, joint = _records(run)
  assert (plan['stage'], joint['stage']) == ('plan', 'joint')
  rows, scores = ('own', 'true_drafts'), ('latent_distance', 'retrieval')
  numbers = [joint[f'sample/{row}/{score}'] for row in rows for score in scores]
  assert np.isfinite(numbers).all()
  with Image.open(run / 'samples' / 'step_0000002.png') as sheet:
    assert sheet.width > 4 * 64 and np.asarray(sheet).std() > 1


def test_a_run_killed_three_times_equals_an_uninterrupted_run(
  start: Callable[..., Process], finished: Path, tmp_path: Path
) -> None:
  workdir = tmp_path / 'run'

  # 1. Between two steps of the first stage, with a checkpoint to resume from.
  process = start(workdir)
  process.until(lambda: _has(workdir, 'plan', EVERY + 3) and EVERY in _saved(workdir))
  process.send(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  whole = _saved(workdir)

  # 2. While a checkpoint is being written: it must not count as one.
  process = start(workdir)
  _kill_while_saving(process, workdir)
  assert process.wait() == -signal.SIGKILL
  assert _resumed(process) == whole[-1]
  whole = _saved(workdir)

  # 3. In the second stage.
  process = start(workdir)
  process.until(lambda: _has(workdir, 'joint', 5) and max(_saved(workdir)) >= PLAN)
  process.send(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert _resumed(process) == whole[-1]
  assert len(_records(workdir)) < PLAN + JOINT

  process = start(workdir)
  assert process.wait() == 0, process.text()
  assert _resumed(process) >= PLAN
  _assert_same_run(workdir, finished)


def _stop(process: Process, workdir: Path, number: signal.Signals) -> int:
  """Sends a signal to a run in its first stage; returns the step that it saves before it ends."""
  process.until(lambda: _has(workdir, 'plan', 3))
  process.send(number)
  assert process.wait() == 128 + number, process.text()
  # launch/quickstart.sh looks for a line with this beginning.
  message = re.search(r'^preempted: saved step (\d+)', process.text(), re.MULTILINE)
  assert message, process.text()
  step = int(message[1])
  assert _saved(workdir)[-1] == step < PLAN + JOINT
  assert len(_records(workdir)) == step
  return step


def test_a_run_saves_on_sigterm_and_resumes_later(
  start: Callable[..., Process], finished: Path, tmp_path: Path
) -> None:
  workdir = tmp_path / 'run'
  step = _stop(start(workdir), workdir, signal.SIGTERM)
  process = start(workdir)
  assert process.wait() == 0, process.text()
  assert _resumed(process) == step
  _assert_same_run(workdir, finished)


def test_a_run_saves_on_ctrl_c(start: Callable[..., Process], tmp_path: Path) -> None:
  _stop(start(tmp_path / 'run'), tmp_path / 'run', signal.SIGINT)


def test_ctrl_c_during_compilation_stops_at_once(
  start: Callable[..., Process], tmp_path: Path
) -> None:
  # No stored program has this setting, so compiling takes seconds.
  process = start(tmp_path / 'run', f'--config.optim.b2={0.9 + time.time() % 1 / 100}')
  process.until(lambda: process.log.exists() and 'compiling the steps' in process.text())
  process.send(signal.SIGINT)
  assert process.wait() == 130, process.text()
  assert process.text().splitlines()[-1] == 'interrupted' and 'saved' not in process.text()


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
  files = [path for path in folder.rglob('*') if path.is_file()]
  return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


@pytest.fixture(scope='module')
def mistakes(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """The output of each mistaken command; exit status and side effects are checked here."""
  folder = tmp_path_factory.mktemp('mistakes')
  (folder / 'images').mkdir()
  (folder / 'images' / 'fox.png').write_bytes(b'no image')
  (folder / 'images' / 'captions.jsonl').write_text(
    json.dumps({'file': 'fox.png', 'caption': 'a red fox'})
  )
  # The commands run in parallel, and a workdir accepts one run at a time.
  workdirs = (f'--workdir={folder / str(number)}' for number in itertools.count())
  before = _listing(finished)
  prompt = '--prompt=' + 'red ' * 500
  calls = {
    'unknown key': ('main', CONFIG, next(workdirs), '--config.optm.lr=1'),
    'bad value': ('main', CONFIG, next(workdirs), '--config.optim.lr=fast'),
    'bad preset': ('main', '--config=configs/t2i.py:debgu', next(workdirs)),
    'other config': ('main', CONFIG, f'--workdir={finished}', *LENGTH, '--config.seed=7'),
    'no weights': (
      'main',
      CONFIG,
      next(workdirs),
      '--config.model.visual_prompt.tower_weights=nowhere.safetensors',
    ),
    'indivisible batch': ('main', CONFIG, next(workdirs), '--config.batch_size=(6, 6)'),
    'unreadable image': (
      'main',
      CONFIG,
      next(workdirs),
      f'--config.data.source=folder:{folder / "images"}',
    ),
    'long prompt': ('sample', f'--workdir={finished}', prompt, f'--out={folder / "x.png"}'),
    'no run': ('sample', f'--workdir={folder / "none"}', '--prompt=a', f'--out={folder / "x.png"}'),
  }
  processes = {
    name: Process(*command, log=folder / f'{name}.txt', devices=4)
    for name, command in calls.items()
  }
  try:
    statuses = {name: process.wait() for name, process in processes.items()}
  finally:
    for process in processes.values():
      process.kill()
  outputs = {name: process.text() for name, process in processes.items()}
  assert statuses == dict.fromkeys(calls, 2), '\n\n'.join(outputs.values())
  assert _listing(finished) == before, 'a mistake changed the run'
  assert not list(folder.glob(f'*/{FOLDER}')) and not (folder / 'x.png').exists()
  return outputs


@pytest.mark.parametrize(
  ('mistake', 'fragments'),
  [
    ('unknown key', ("'optm", "did you mean 'optim'")),
    ('bad value', ('optim.lr', 'fast')),
    ('bad preset', ("'debgu'", "did you mean 'debug'")),
    ('other config', ('seed was 0, now 7', '--allow_change=seed')),
    ('no weights', ('nowhere.safetensors',)),
    ('indivisible batch', ('batch_size 6', '4 batch shards')),
    ('unreadable image', ('fox.png',)),
    ('long prompt', ('prompt',)),
    ('no run', ('none',)),
  ],
)
def test_a_mistake_ends_with_one_line(
  mistakes: dict[str, str], mistake: str, fragments: tuple[str, ...]
) -> None:
  output = mistakes[mistake]
  assert 'Traceback' not in output
  lines = [line for line in output.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1 and output.splitlines()[-1] == lines[0], output
  for fragment in fragments:
    assert fragment in lines[0]
