"""Tests of training in two processes of four devices: equal losses and a joint stop."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training.one_of_two import FAILURE, START_UP
from vpe_jax import front_door, sharding
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import CheckpointConfig
from vpe_jax.training import loop, metrics

SCRIPT = Path(__file__).with_name('one_of_two.py')
ROOT = Path(__file__).parents[2]


def _start(workdir, weights, index, port, *arguments):
  variables = {
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': '2',
    'JAX_PROCESS_ID': str(index),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
  }
  with open(workdir.parent / f'log{index}.txt', 'w', encoding='utf-8') as log:
    return subprocess.Popen(
      [sys.executable, str(SCRIPT), str(workdir), weights, *arguments],
      env=os.environ | variables,
      stdout=log,
      stderr=subprocess.STDOUT,
    )


@pytest.fixture
def pair(tmp_path, frozen):
  """Starts two processes on one workdir: pair(steps, *phases) -> processes."""
  children = []

  def make(steps, *phases):
    with socket.socket() as listener:
      listener.bind(('127.0.0.1', 0))
      port = listener.getsockname()[1]
    workdir, weights = tmp_path / 'run', frozen['encoder'].source
    new = [_start(workdir, weights, i, port, str(steps), *phases) for i in (0, 1)]
    children.extend(new)
    return new

  yield make
  for process in children:
    process.kill()
    process.wait()


def _logs(tmp_path):
  return '\n'.join(path.read_text() for path in sorted(tmp_path.glob('log*.txt')))


def _statuses(processes, seconds):
  """Exit statuses; None for a process that still runs after so many seconds."""
  deadline = time.monotonic() + seconds
  while None in (statuses := [process.poll() for process in processes]):
    if time.monotonic() > deadline:
      break
    time.sleep(0.1)
  return statuses


@pytest.mark.slow
def test_two_processes_match_a_single_process(pair, tmp_path, line_system, frozen):
  assert _statuses(pair(4), 120) == [0, 0], _logs(tmp_path)
  system = line_system()
  system.frozen = frozen
  loop.train(system.config, system, str(tmp_path / 'single'))
  pair_records, single = metrics.read(tmp_path / 'run'), metrics.read(tmp_path / 'single')
  assert [record['step'] for record in pair_records] == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(
    [record['loss'] for record in pair_records],
    [record['loss'] for record in single],
    rtol=1e-5,
  )


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_the_same_step(pair, tmp_path):
  processes, workdir = pair(100_000), tmp_path / 'run'
  deadline = time.monotonic() + 120
  while len(metrics.read(workdir)) <= 5:
    assert time.monotonic() < deadline and processes[0].poll() is None, _logs(tmp_path)
    time.sleep(0.1)
  processes[1].send_signal(signal.SIGTERM)
  assert _statuses(processes, 120) == [0, 0], _logs(tmp_path)
  assert 'preempted: saved step' in _logs(tmp_path)
  saved = Store(str(workdir / FOLDER), CheckpointConfig()).steps()[-1]
  assert [record['step'] for record in metrics.read(workdir)] == list(range(1, saved + 1))


@pytest.mark.slow
@pytest.mark.parametrize('phase', START_UP)
@pytest.mark.parametrize('receiver', [0, 1])
def test_sigterm_before_the_first_step_ends_both_at_once(pair, tmp_path, phase, receiver):
  processes = pair(4, phase)
  deadline = time.monotonic() + 120
  while _logs(tmp_path).count('waiting') < 2:
    assert time.monotonic() < deadline and processes[0].poll() is None, _logs(tmp_path)
    time.sleep(0.1)
  processes[receiver].send_signal(signal.SIGTERM)
  assert _statuses(processes, 20) == [front_door.TERMINATED] * 2, _logs(tmp_path)
  assert _logs(tmp_path).count('preempted: no step is unsaved') == 1


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other_which_waits_for_it(pair, tmp_path):
  processes, deadline = pair(4, FAILURE), time.monotonic() + 120
  while 'the folder is missing here' not in (tmp_path / 'log1.txt').read_text():
    assert time.monotonic() < deadline, _logs(tmp_path)
    time.sleep(0.1)
  statuses = _statuses(processes, sharding.SHUTDOWN_TIMEOUT + 20)
  assert None not in statuses and 0 not in statuses, _logs(tmp_path)
