"""Signals in a training loop: the first saves, unless nothing is unsaved; a second Ctrl-C stops."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.outcomes import outcome, result_of
from vpe_jax import front_door, interrupts, sharding
from vpe_jax.training import preemption as preemption_lib
from vpe_jax.training.preemption import Preemption


@pytest.fixture(autouse=True)
def _default_handler():
  """Python's handler, also if the tests run in the background, where a shell ignores Ctrl-C."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def _press():
  os.kill(os.getpid(), signal.SIGINT)


def test_the_first_press_saves_and_the_second_stops():
  with Preemption() as preemption:
    _press()
    assert preemption.interrupted and preemption.reached()
    with pytest.raises(KeyboardInterrupt):
      _press()


def test_where_nothing_is_unsaved_the_first_press_stops():
  with Preemption() as preemption:
    with pytest.raises(KeyboardInterrupt), preemption.nothing_unsaved():
      assert not interrupts._free.acquire(blocking=False)
      _press()
    assert not preemption.interrupted and interrupts._free._value == 1
    _press()
    assert preemption.interrupted
  assert interrupts._free._value == 0


def test_where_nothing_is_unsaved_sigterm_has_its_previous_effect():
  received = []
  before = signal.signal(signal.SIGTERM, lambda *_: received.append('earlier handler'))
  try:
    with Preemption() as preemption:
      with preemption.nothing_unsaved():
        os.kill(os.getpid(), signal.SIGTERM)
      assert received == ['earlier handler'] and not preemption.reached()
      os.kill(os.getpid(), signal.SIGTERM)
      assert len(received) == 1 and preemption.reached()
  finally:
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def watch(monkeypatch):
  """Makes a _Watch whose thread looks every `poll` seconds."""
  made = []

  def make(poll, leave=lambda: None):
    monkeypatch.setattr(preemption_lib, 'POLL', poll)
    made.append(preemption_lib._Watch(leave))
    return made[-1]

  yield make
  for one in made:
    one.stop()


def test_a_process_that_ends_does_not_look_again(watch, monkeypatch):
  def look():
    raise RuntimeError('the process has left its group')

  monkeypatch.setattr(preemption_lib, '_preempted', look)
  others = lambda calls: np.array([calls, calls + 3])
  monkeypatch.setattr(preemption_lib.multihost_utils, 'process_allgather', others)
  ending = watch(1000.0)
  ending._reached = True
  assert result_of(ending.align) is True


def test_a_collective_that_fails_because_others_have_ended_ends_the_process(monkeypatch):
  class Ending:
    """A watch that has seen SIGTERM, which others have seen before."""

    def __init__(self, leave):
      del leave

    def stop(self):
      return True

    def align(self):
      raise RuntimeError('another process has ended')

  left = []
  monkeypatch.setattr(preemption_lib, '_Watch', Ending)
  monkeypatch.setattr(preemption_lib.jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(Preemption, '_leave', lambda self: left.append(self))

  def run():
    with Preemption() as preemption, preemption.nothing_unsaved():
      pass

  outcome(run)
  assert len(left) == 1


def test_looks_that_a_busy_process_missed_are_made_up_for(watch, monkeypatch):
  calls = preemption_lib._calls
  monkeypatch.setattr(sharding, 'preempted', lambda number: False)
  monkeypatch.setattr(preemption_lib, '_calls', calls)
  late = watch(0.02)
  with late._lock:
    time.sleep(1.0)
  time.sleep(0.5)
  late.stop()
  assert preemption_lib._calls - calls > 60  # 75 in time, 25 without the missed ones


STARTING = """
import multiprocessing
import time
child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(300,), daemon=True)
child.start()
from vpe_jax import sharding
from vpe_jax.training.preemption import Preemption
sharding.initialize_distributed()
with Preemption() as preemption:
  with preemption.nothing_unsaved():
    pass
  assert not preemption.reached()
  with preemption.nothing_unsaved():
    print(child.pid, flush=True)
    time.sleep(300)
"""


def _is_running(number):
  """Whether a process runs; one that has ended may wait for its parent."""
  try:
    state = Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()[0]
  except FileNotFoundError:
    return False
  return state != 'Z'


def test_under_the_coordination_service_sigterm_ends_a_start_at_once():
  environment = {key: value for key, value in os.environ.items() if not key.startswith('JAX_NUM')}
  process = subprocess.Popen(
    [sys.executable, '-c', STARTING], env=environment, text=True, stdout=subprocess.PIPE
  )
  child = int(process.stdout.readline())
  try:
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
      time.sleep(0.1)
    assert process.returncode == front_door.TERMINATED
    assert process.stdout.readline().startswith('preempted: no step is unsaved')
    assert not _is_running(child)
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    if _is_running(child):
      os.kill(child, signal.SIGKILL)
