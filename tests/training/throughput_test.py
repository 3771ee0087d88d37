"""Tests of throughput, FLOPs utilization and remaining time."""

import pytest

from vpe_jax.training import throughput
from vpe_jax.training.model_flops import step_flops
from vpe_jax.training.throughput import Meter, StageWork

WORK = (StageWork(10, 8, 80, 4e12), StageWork(20, 16, 320, 8e12))


@pytest.fixture
def clock(monkeypatch):
  times = [0.0]
  monkeypatch.setattr(throughput.time, 'perf_counter', lambda: times[0])
  return times


def test_rates_and_utilization(clock):
  meter = Meter(WORK, 4, 'TPU v5p')
  clock[0] = 2.0
  speeds = meter.lap(1)
  assert speeds['step_time'] == 2.0 and speeds['images_per_s'] == 8.0
  assert speeds['tokens_per_s'] == 160.0 and speeds['tflops_per_s'] == 4.0
  assert speeds['mfu'] == pytest.approx(4e12 / (4 * 459e12))


def test_no_utilization_if_the_peak_is_unknown(clock):
  meter = Meter(WORK, 1, 'cpu')
  clock[0] = 1.0
  assert 'mfu' not in meter.lap(0)


def test_restart_excludes_pauses(clock):
  meter = Meter(WORK, 1, 'cpu')
  clock[0] = 100.0
  meter.restart()
  clock[0] = 101.0
  assert meter.lap(0)['step_time'] == 1.0


def test_remaining_time_scales_with_the_flops_of_later_stages():
  meter = Meter(WORK, 1, 'cpu')
  # 4 steps of 3 s, then 20 steps with twice the FLOPs.
  assert meter.remaining(0, 6, 3.0) == pytest.approx(4 * 3 + 20 * 6)
  assert meter.remaining(1, 15, 2.0) == pytest.approx(10)


def test_work_comes_from_the_system(line_system):
  system = line_system(steps=(3, 5), batch_size=(8, 16))
  first, second = throughput.work_of(system.config, system)
  assert (first.steps, second.examples) == (3, 16)
  assert second.flops == step_flops(system, system.stages[1], 16).total > 0
  assert second.tokens == 16 * system.tokens(system.stages[1])
