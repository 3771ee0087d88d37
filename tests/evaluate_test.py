"""The evaluate command: mistakes are one line and status 2, reports go where they belong."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from vpe_jax import evaluate
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.report import Report, Row

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  'args, message',
  [
    ([], '--workdir is missing'),
    (['--workdir=w', '--benchmarks=retrival'], "did you mean 'retrieval'"),
    (['--workdir=w', '--benchmarks=retrieval', '--splits=concepts'], "did you mean 'concept'"),
    (['--workdir=/no/such/run'], '/no/such/run'),
    (['--workdir=w', '--set=mixes.count=4'], '--benchmarks does not name mixes'),
    (['--workdir=w', '--benchmarks=best_of', '--set=best_of.plans=1'], 'plans is 1'),
    (['--workdir=w', '--benchmarks=mixes', '--set=mixes.counts=4'], "did you mean 'count'"),
    (['--workdir=w', '--set=mixes'], 'NAME.OPTION=VALUE'),
  ],
)
def test_mistakes_are_one_line_and_status_2(args, message):
  command = [sys.executable, '-m', 'vpe_jax.evaluate', *args]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith('error: ') and message in line
  assert 'Traceback' not in done.stderr


@pytest.fixture
def command(monkeypatch, fake_subject):
  """The command with stand-ins for models and evaluation; `evaluated` names the subjects."""
  # FLAGS[name].value is the value of a flag.
  cls = type('Flags', (types.SimpleNamespace,), {})
  cls.__getitem__ = lambda self, name: types.SimpleNamespace(value=vars(self)[name])
  flags = cls(workdir=[], benchmarks=[], set=[], captions=2, splits=['concept'], seed=0)
  flags.judge, flags.out, flags.evaluated, flags.subjects = '', None, [], {}
  monkeypatch.setattr(evaluate, 'FLAGS', flags)
  monkeypatch.setattr(evaluate.devices, 'use_compilation_cache', lambda: None)

  def load(workdir):
    subject = fake_subject(None)
    subject.description = {'checkpoint': workdir.split('/')[-1]}
    return flags.subjects.get(workdir, subject)

  def run(self, subject):
    flags.evaluated.append(subject.description['checkpoint'])
    image = np.full((1, 16, 16, 3), len(flags.evaluated), np.uint8)
    sheets = {'concept': (Row('generated', image),)}
    return Report({}, (f'table of {flags.evaluated[-1]}',), {'a': 1}, sheets)

  monkeypatch.setattr(evaluate, '_load', load)
  monkeypatch.setattr(retrieval.Retrieval, 'run', run)
  return flags


def test_several_runs_have_a_table_and_a_folder_each(command, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  command.workdir = ['runs/a', 'b.safetensors']
  evaluate.main()
  printed = capsys.readouterr().out
  assert printed.index('table of a\nwrote runs/a') < printed.index('table of b.safetensors')
  written = sorted(path.name for path in (tmp_path / 'runs/a/evaluation').iterdir())
  assert [name for name in written if '-compared-' in name] == written[-1:] and len(written) == 3
  assert len(list((tmp_path / 'evaluation').iterdir())) == 2


def test_an_evaluator_that_does_not_fit_the_last_run_ends_before_the_first_samples(
  command, tmp_path, fake_subject
):
  command.subjects['b'] = fake_subject(None, task='classes')
  command.workdir, command.out, command.benchmarks = ['a', 'b'], str(tmp_path), ['retrieval']
  with pytest.raises(UserError, match='retrieval is for captions, and this model takes classes'):
    evaluate.main()
  assert not command.evaluated and not list(tmp_path.iterdir())


def test_a_folder_is_checked_before_sampling_and_the_table_outlives_a_failure(
  command, tmp_path, capsys, monkeypatch
):
  (tmp_path / 'file').write_text('kept')
  command.workdir, command.out = ['runs/a'], str(tmp_path / 'file')
  with pytest.raises(UserError, match='cannot write to'):
    evaluate.main()
  assert not command.evaluated
  monkeypatch.setattr(evaluate.front_door, 'check_folder', lambda folder: None)
  with pytest.raises(UserError, match='cannot write'):
    evaluate.main()
  assert 'table of a' in capsys.readouterr().out
