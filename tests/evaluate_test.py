"""The evaluate command: mistakes are one line and status 2."""

import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from vpe_jax import evaluate
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import runner
from vpe_jax.evaluation.report import Report, Row, Subject

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  'args, message',
  [
    ([], '--workdir is missing'),
    (['--workdir=w', '--benchmarks=retrival'], "did you mean 'retrieval'"),
    (['--workdir=w', '--splits=concepts'], "did you mean 'concept'"),
    (['--workdir=/no/such/run'], '/no/such/run'),
    (['--workdir=w', '--best_of=1'], 'best_of is 1: at least 2 plans'),
    (['--workdir=w', '--benchmarks=mixes'], 'mixes is 0: at least 2'),
    (['--workdir=w', 'x'], "unexpected argument 'x'"),
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
def commands(monkeypatch):
  """The command with stand-ins for what takes minutes: sets its flags; what was evaluated."""
  given = types.SimpleNamespace(
    workdir=[],
    benchmarks=[],
    best_of=0,
    mixes=0,
    captions=2,
    splits=['concept'],
    seed=0,
    judge='',
    out=None,
  )
  monkeypatch.setattr(evaluate, 'FLAGS', given)
  monkeypatch.setattr(evaluate.machine, 'use_compilation_cache', lambda: None)
  said = lambda workdir: {'checkpoint': workdir.split('/')[-1]}
  monkeypatch.setattr(evaluate, '_load', lambda workdir: Subject(np.zeros, 4, said(workdir)))
  given.evaluated = []

  def run(names, subject, options):
    given.evaluated.append(subject.description['checkpoint'])
    given.names = names
    image = np.full((1, 16, 16, 3), len(given.evaluated), np.uint8)
    sheets = {'concept': (Row('generated', image),)}
    return {'retrieval': Report((f'table of {given.evaluated[-1]}',), {}, sheets)}

  monkeypatch.setattr(runner, 'run', run)
  return given


def test_several_runs_have_a_table_and_a_folder_each(commands, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  commands.workdir = ['runs/a', 'b.safetensors']
  evaluate.main()
  said = capsys.readouterr().out
  assert said.index('== runs/a\ntable of a\nwrote runs/a') < said.index('table of b.safetensors')
  written = sorted(path.name for path in (tmp_path / 'runs/a/evaluation').iterdir())
  assert [name for name in written if '-compared-' in name] == written[-1:] and len(written) == 3
  assert len(list((tmp_path / 'evaluation').iterdir())) == 2
  assert commands.names == []


def test_a_benchmark_that_does_not_fit_the_last_run_ends_before_the_first_draws(
  commands, tmp_path, monkeypatch
):
  classes = Subject(np.zeros, 4, {'checkpoint': 'b', 'weights': 'runs/b (ema)'}, task='classes')
  subjects = {'a': Subject(np.zeros, 4, {'checkpoint': 'a'}), 'b': classes}
  monkeypatch.setattr(evaluate, '_load', subjects.get)
  commands.workdir, commands.out, commands.benchmarks = ['a', 'b'], str(tmp_path), ['retrieval']
  with pytest.raises(
    UserError, match=r'and runs/b \(ema\) draws pictures of classes: it has classes'
  ):
    evaluate.main()
  assert not commands.evaluated and not list(tmp_path.iterdir())


def test_flags_of_benchmarks_ask_for_them(commands, tmp_path):
  commands.workdir, commands.out = ['a'], str(tmp_path)
  commands.best_of = commands.mixes = 2
  evaluate.main()
  assert commands.names == ['best_of', 'mixes']
  commands.benchmarks = ['retrieval', 'mixes']
  evaluate.main()
  assert commands.names == ['retrieval', 'mixes', 'best_of']


def test_a_folder_is_checked_before_drawing_and_the_table_outlives_a_failure(
  commands, tmp_path, capsys, monkeypatch
):
  (tmp_path / 'file').write_text('kept')
  commands.workdir, commands.out = ['runs/a'], str(tmp_path / 'file')
  with pytest.raises(UserError, match='cannot write to'):
    evaluate.main()
  assert not commands.evaluated
  monkeypatch.setattr(evaluate.front_door, 'check_folder', lambda folder: None)
  with pytest.raises(UserError, match='cannot write'):
    evaluate.main()
  assert 'table of a' in capsys.readouterr().out
