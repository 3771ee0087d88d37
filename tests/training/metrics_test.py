"""Tests of the metrics file: every step exactly once after resumes, crashes and damage."""

import json

import pytest

from vpe_jax.training import metrics


def _write(folder, steps, resumed, numbered=False):
  file = metrics.MetricsFile(folder, resumed, numbered)
  for step in steps:
    file.write({'step': step, 'loss': step / 3})
  file.close()


def _steps(folder, numbered=False):
  return [record['step'] for record in metrics.read(folder, numbered)]


@pytest.mark.parametrize('numbered', [False, True])
def test_resume_drops_later_records(tmp_path, numbered):
  _write(tmp_path, range(1, 6), 0, numbered)
  _write(tmp_path, range(4, 8), 3, numbered)
  assert _steps(tmp_path, numbered) == [1, 2, 3, 4, 5, 6, 7]
  assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('numbered', [False, True])
def test_new_run_renames_existing_files(tmp_path, numbered, capsys):
  for last in (3, 4, 5):
    _write(tmp_path, range(1, last), 0, numbered)
  assert _steps(tmp_path, numbered) == [1, 2, 3, 4]
  name = 'metrics-000000001.jsonl' if numbered else metrics.FILE
  renamed = [(tmp_path / f'{name}.{end}').read_text() for end in ('before', 'before2')]
  assert [len(metrics.parse(text)) for text in renamed] == [2, 3]
  assert f'{name} were renamed to {name}.before2' in capsys.readouterr().out


@pytest.mark.parametrize('numbered', [False, True])
def test_files_of_other_names_are_left_alone(tmp_path, numbered):
  _write(tmp_path, range(1, 6), 0, numbered)
  names = ['metrics-backup.jsonl', 'metrics-000000001-copy.jsonl']
  names.append(metrics.FILE if numbered else 'metrics-000000001.jsonl')
  for name in names:
    (tmp_path / name).write_text('{"step": 9}\n')
  _write(tmp_path, [3], 2, numbered)
  assert _steps(tmp_path, numbered) == [1, 2, 3]
  assert [(tmp_path / name).read_text() for name in names] == ['{"step": 9}\n'] * 3


def test_damaged_lines_are_skipped_and_backed_up(tmp_path, capsys):
  _write(tmp_path, range(1, 6), 0)
  path = tmp_path / metrics.FILE
  lines = path.read_bytes().split(b'\n')
  lines[1], lines[3] = b'{"step": 2, "lo\xff', b'[4]'
  path.write_bytes(damaged := b'\n'.join(lines))
  assert _steps(tmp_path) == [1, 3, 5]
  _write(tmp_path, [5, 6], 4)
  assert _steps(tmp_path) == [1, 3, 5, 6]
  output = capsys.readouterr().out
  assert f'{path} is damaged in line 2, 4' in output and f'is in {path.name}.damaged' in output
  assert (tmp_path / f'{path.name}.damaged').read_bytes() == damaged
  _write(tmp_path, [7], 6)
  assert not capsys.readouterr().out


def test_truncated_line_is_dropped(tmp_path):
  _write(tmp_path, range(1, 4), 0)
  with open(tmp_path / metrics.FILE, 'a', encoding='utf-8') as stream:
    stream.write('{"step": 4, "loss": 1.')
  assert _steps(tmp_path) == [1, 2, 3]
  _write(tmp_path, [4], 3)
  assert _steps(tmp_path) == [1, 2, 3, 4]


def test_each_line_is_flushed(tmp_path):
  file = metrics.MetricsFile(tmp_path, 0)
  file.write({'step': 1, 'loss': 0.5})
  assert _steps(tmp_path) == [1]
  file.close()


def test_parts_are_numbered_by_their_first_step(tmp_path):
  file = metrics.MetricsFile(tmp_path, 0, numbered=True)
  for step in range(1, 4):
    file.write({'step': step})
  assert _steps(tmp_path, numbered=True) == []
  file.flush()
  file.write({'step': 4})
  file.close()
  assert [path.name for path in sorted(tmp_path.iterdir())] == [
    'metrics-000000001.jsonl', 'metrics-000000004.jsonl'
  ]  # fmt: skip
  assert _steps(tmp_path, numbered=True) == [1, 2, 3, 4]


def test_values_keep_float32_precision_and_nan_is_null(tmp_path):
  value = 0.1234567890123
  file = metrics.MetricsFile(tmp_path, 0)
  file.write({'step': 1, 'loss': float('nan'), 'lr': value, 'stage': 'joint'})
  file.close()
  record = json.loads((tmp_path / metrics.FILE).read_text())
  assert record == {'step': 1, 'loss': None, 'lr': 0.123456789, 'stage': 'joint'}


def test_remote_folders_are_recognized_by_their_scheme():
  assert metrics.is_remote('gs://bucket/run') and not metrics.is_remote('runs/t2i-tiny')
