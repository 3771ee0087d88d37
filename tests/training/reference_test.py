"""Tests of the comparison with the shipped reference run."""

import json

from vpe_jax.training import metrics, reference


def _records(scale, steps=60, change=30):
  return [
    {
      'step': s,
      'stage': 'a' if s <= change else 'b',
      'stage_step': s if s <= change else s - change,
      'loss': scale * s,
      'loss/flow': scale * s,
      'lr': 1.0,
    }
    for s in range(1, steps + 1)
  ]


def test_means_are_within_the_stage_and_up_to_the_step():
  assert reference.trailing_means(_records(1.0), 'b', 10) == {'flow': 35.5}
  assert reference.trailing_means(_records(1.0), 'b', 30) == {'flow': 50.5}


def test_comparison_is_at_the_last_common_step_of_the_stage(tmp_path, monkeypatch, line_config):
  monkeypatch.setattr(reference, 'ASSETS', tmp_path)
  config = line_config()
  assert reference.comparison(config, tmp_path) is None
  lines = '\n'.join(json.dumps(record) for record in _records(2.0, steps=90, change=50)) + '\n'
  (tmp_path / 'line-debug.metrics.jsonl').write_text(lines)
  run = tmp_path / 'run'
  file = metrics.MetricsFile(run, 0)
  for record in _records(1.0):
    file.write(record)
  file.close()
  assert reference.comparison(config, run) == (
    'your loss / reference loss after 30 steps of b: flow 50.5000 / 141.0000'
  )


def test_steps_without_a_value_are_skipped():
  records = _records(1.0, steps=3, change=0)
  records[1]['loss/flow'] = None
  assert reference.trailing_means(records, 'b', 3)['flow'] == 2.0
