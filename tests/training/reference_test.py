"""Tests of the comparison with the shipped reference run."""

import types

import pytest

from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import Stage
from vpe_jax.training import config_file, metrics, reference


def _records(scale, steps=60, change=30):
  return [
    {
      'step': s,
      'stage': 'a' if s <= change else 'b',
      'stage_step': s if s <= change else s - change,
      'loss': scale * s,
      'loss/flow': scale * s,
      'loss/accuracy': 1.0 / scale,
      'lr': 1.0,
    }
    for s in range(1, steps + 1)
  ]


def _system(steps=(30, 30), **optim):
  losses = {'flow': 1.0, 'accuracy': 0.0}
  stages = [Stage(name, (), losses, ema=False) for name in 'ab']
  overrides = {'steps': str(steps)} | {f'optim.{key}': value for key, value in optim.items()}
  config = systems.build(config_file.load('configs/t2i.py:debug', overrides)).config
  return types.SimpleNamespace(stages=stages, config=config)


def test_means_are_within_the_stage_and_up_to_the_step():
  assert reference.trailing_means(_records(1.0), 'b', 10)['flow'] == 35.5
  assert reference.trailing_means(_records(1.0), 'b', 30)['flow'] == 50.5


def test_steps_without_a_value_are_skipped():
  records = _records(1.0, steps=3, change=0)
  records[1]['loss/flow'] = None
  assert reference.trailing_means(records, 'b', 3)['flow'] == 2.0


@pytest.mark.parametrize(
  'scale, verdict',
  [(0.5, 'as expected'), (1.05, 'as expected'), (1.5, 'flow is 50% above the reference')],
)
def test_each_stage_gets_a_verdict(scale, verdict):
  first, second = reference.compare_stages(_system(), _records(scale), _records(1.0))
  assert first.startswith('a: your loss / reference loss at step 30: flow ')
  assert second.startswith(f'b: your loss / reference loss at step 30: flow {scale * 50.5:.4f} /')
  assert verdict in first and verdict in second and 'accuracy' not in first + second


def test_a_stage_after_one_of_another_length_gets_no_verdict():
  longer = _records(2.0, steps=90, change=50)
  first, second = reference.compare_stages(_system(), _records(1.0), longer)
  assert first.endswith('as expected') and 'at step 30: flow 20.5000 / 41.0000' in first
  assert second.endswith(': earlier steps differ (a 30 / 50)')


@pytest.mark.parametrize(
  'schedule, steps, decay_steps, verdict',
  [
    ('linear', 60, '0', 'the learning rates decay over 60 / 30 steps'),
    ('linear', 20, '0', 'as expected'),
    ('linear', 60, '80', 'as expected'),
    ('rsqrt', 60, '0', 'as expected'),
  ],
)
def test_longer_decay_gets_no_verdict(schedule, steps, decay_steps, verdict):
  system = _system((steps, 30), schedule=schedule, decay_steps=decay_steps)
  ours = _records(1.0, steps=steps, change=steps)
  (line,) = reference.compare_stages(system, ours, _records(1.0))
  assert line.endswith(f': {verdict}')


@pytest.mark.parametrize(
  'overrides, fields',
  [
    ({}, []),
    ({'steps': '(9, 9)', 'data.examples': '20000', 'log.every': '5'}, []),
    ({'data.examples': '500'}, ['data.examples']),
    ({'data.source': 'folder:mine'}, ['data.source']),
    ({'start': 'assets:tiny'}, ['start']),
    ({'optim.lr': '1e-3'}, ['optim.lr']),
    ({'stages': 'joint'}, ['batch_size', 'stages']),
  ],
)
def test_only_a_run_that_trains_the_same_is_compared(tmp_path, overrides, fields):
  system = systems.build(config_file.load('configs/t2i.py', overrides))
  stored = weights.config_of(weights.load('assets:tiny')[1], 'assets:tiny')
  assert reference.incomparable(system.config, stored) == fields
  if fields:
    line = reference.comparison(system, tmp_path)
    assert 'is not compared' in line and ', '.join(fields) in line


def test_the_reference_run_is_as_expected(tmp_path):
  file = metrics.MetricsFile(tmp_path, 0)
  for record in metrics.parse((reference.ASSETS / 't2i-tiny.metrics.jsonl').read_text()):
    file.write(record)
  file.close()
  lines = reference.comparison(systems.build(config_file.load('configs/t2i.py', {})), tmp_path)
  assert [line.endswith('as expected') for line in lines.splitlines()] == [True, True]


def test_a_run_without_a_reference_is_not_compared(line_system, tmp_path):
  assert reference.comparison(line_system(), tmp_path) is None
