"""Tests of the run's log: records, progress line, skipped steps and TensorBoard."""

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from vpe_jax.contracts import UserError
from vpe_jax.training import logging, metrics, throughput


@pytest.fixture
def open_log(tmp_path, line_system):
  def make(resumed=0, **changes):
    system = line_system(**changes)
    return logging.RunLog(tmp_path, system.config, system, resumed)

  return make


def _push(log, step, loss=1.5, skipped=0.0, **more):
  counters = {'stage': 0, 'step': step, 'stage_step': step}
  values = {'loss': loss, 'loss/tokens': loss, 'skipped': skipped, 'grad_norm': 1.0}
  log.push(counters, values | more)


def test_record_is_written_by_the_next_push(open_log, tmp_path):
  log = open_log()
  _push(log, 1)
  assert metrics.read(tmp_path) == []
  _push(log, 2)
  assert [record['step'] for record in metrics.read(tmp_path)] == [1]
  log.flush()
  assert [record['step'] for record in metrics.read(tmp_path)] == [1, 2]
  log.close()


def test_added_values_join_the_newest_record(open_log, tmp_path):
  log = open_log()
  _push(log, 1)
  _push(log, 2)
  log.add({'eval/tokens': 0.25})
  _push(log, 3)
  log.flush()
  log.close()
  assert [record.get('eval/tokens') for record in metrics.read(tmp_path)] == [None, 0.25, None]


def test_consecutive_skipped_steps_end_the_run(open_log, tmp_path):
  log = open_log()
  for step in range(1, logging.MAX_SKIPPED):
    _push(log, step, skipped=1.0)
  _push(log, logging.MAX_SKIPPED, skipped=0.0)
  for step in range(6, 10):
    _push(log, step, skipped=1.0)
  _push(log, 10, skipped=1.0)
  with pytest.raises(UserError, match='not finite in 5 consecutive steps .up to step 10.'):
    log.settle()
  log.close()
  assert metrics.read(tmp_path)[-1]['step'] == 10  # the last skipped step is recorded


@pytest.mark.parametrize('index, lines', [(0, 1), (1, 0)])
def test_only_process_0_prints_skipped_steps(open_log, monkeypatch, capsys, index, lines):
  monkeypatch.setattr(logging.jax, 'process_index', lambda: index)
  log = open_log()
  _push(log, 1, skipped=1.0)
  log.settle()
  log.close()
  assert capsys.readouterr().out.count('step 1 skipped') == lines


def test_waiting_for_data_is_recorded_and_warned_of_once(open_log, tmp_path, capsys, monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(throughput.time, 'perf_counter', lambda: float(next(clock)))  # 1 s a step
  log = open_log(log={'every': 2})
  for step, seconds in enumerate((0.5, 0.0, 0.02, 0.25, 0.25), start=1):
    _push(log, step)
    log.waited(seconds)
  log.close()
  waits = [record['data_wait'] for record in metrics.read(tmp_path)]
  assert waits == [0.5, 0.0, 0.02, 0.25]
  warnings = [line for line in capsys.readouterr().out.splitlines() if 'warning' in line]
  assert len(warnings) == 1 and '14% of the time' in warnings[0]
  assert 'data.workers (now 0;' in warnings[0] and 'data.encode=cached' in warnings[0]


def test_progress_line_gives_position_losses_speed_and_eta():
  record = {
    'stage': 'joint', 'stage_step': 20, 'loss': 1.25, 'loss/flow': 0.5, 'loss/next_token': 6.25,
    'step_time': 0.5, 'images_per_s': 128.0, 'tokens_per_s': 13_000.0, 'tflops_per_s': 2.0,
  }  # fmt: skip
  assert logging.progress_line(record, 400, 3725.2) == (
    'joint 20/400 | loss 1.2500 (flow 0.5000, next_token 6.2500) | 0.5 s/step, 128 images/s, '
    '1.3e+04 tokens/s, 2 TFLOP/s | ETA 1:02:06'
  )
  assert 'MFU 41.0%' in logging.progress_line(record | {'mfu': 0.41}, 400, 0)


def _events(folder):
  """The events in the TensorBoard files of a folder."""
  events = []
  for path in sorted(folder.glob('events.out.tfevents.*')):
    content = path.read_bytes()
    while content:  # size (8 bytes), checksum (4), event, checksum (4)
      size = int.from_bytes(content[:8], 'little')
      events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
      content = content[16 + size :]
  return events


def _scalars(folder):
  return [
    (value.tag, value.simple_value, event.step)
    for event in _events(folder)
    for value in event.summary.value
    if value.HasField('simple_value')
  ]


def test_tensorboard_receives_every_float_and_image(open_log, tmp_path):
  log = open_log()
  _push(log, 1, loss=2.5)
  log.flush()
  log.show('sample_grid', np.zeros((2, 3, 3), np.uint8), 1)
  log.close()
  scalars = _scalars(tmp_path)
  assert ('loss', 2.5, 1) in scalars
  assert not {'stage', 'step', 'stage_step'} & {name for name, *_ in scalars}
  values = [(value, event.step) for event in _events(tmp_path) for value in event.summary.value]
  (image,) = [(value, step) for value, step in values if value.HasField('image')]
  assert (image[0].tag, image[1]) == ('sample_grid', 1)
  assert (image[0].image.height, image[0].image.width) == (2, 3)


@pytest.mark.parametrize('resumed', [0, 7])
def test_tensorboard_is_flushed_with_checkpoints_and_purged_at_resume(open_log, tmp_path, resumed):
  log = open_log(resumed)
  _push(log, resumed + 1, loss=2.5)
  log.flush()
  assert ('loss', 2.5, resumed + 1) in _scalars(tmp_path)
  log.close()
  start = event_pb2.SessionLog.START  # TensorBoard hides earlier events from this step on.
  (purged,) = [event for event in _events(tmp_path) if event.session_log.status == start]
  assert purged.step == resumed + 1
