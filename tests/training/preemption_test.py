"""Ctrl-C in a training loop: the first saves, unless nothing is unsaved; the second stops."""

import os
import signal

import pytest

from vpe_jax import interrupts
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
