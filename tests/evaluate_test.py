"""The evaluate command: mistakes, tables, and folders of reports."""

from __future__ import annotations

import json
import pathlib
import re
import types

import numpy as np
import pytest

from tests import commands
from vpe_jax import evaluate
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import convergence, retrieval
from vpe_jax.evaluation.report import Report, Row

ROOT = pathlib.Path(__file__).parents[1]


def test_a_mistake_is_one_line_and_status_2():
  done = commands.run('vpe_jax.evaluate', '--workdir=/no/such/run')
  assert done.returncode == 2
  assert re.fullmatch('error: .*/no/such/run.*', done.stderr.strip().splitlines()[-1])
  assert 'Traceback' not in done.stderr


@pytest.fixture
def command(monkeypatch, fake_subject):
  """The command with fake models and evaluators; `evaluated` lists the evaluated subjects.

  With `load_fails`, loading a model fails the test.
  """
  cls = type('Flags', (types.SimpleNamespace,), {})
  cls.__getitem__ = lambda self, name: types.SimpleNamespace(value=vars(self)[name], present=True)
  flags = cls(workdir=[], benchmarks=[], set=[], captions=2, splits=['concept'], seed=0)
  flags.evaluator_network, flags.out, flags.evaluated, flags.subjects = '', None, [], {}
  flags.load_fails, flags.step, flags.weights = False, None, 'ema'
  monkeypatch.setattr(evaluate, 'FLAGS', flags)
  monkeypatch.setattr(evaluate.front_door, 'flags', types.SimpleNamespace(FLAGS=flags))

  def load(workdir, step):
    assert not flags.load_fails
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


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'workdir': []}, '--workdir'),
    ({'benchmarks': ['retrival']}, "'retrival'"),
    ({'benchmarks': ['retrieval'], 'splits': ['concepts']}, "'concepts'"),
    ({'set': ['mixes.count=4']}, '--set=mixes.count=4'),
    ({'set': ['mixes']}, '--set=mixes'),
    ({'benchmarks': ['mixes'], 'set': ['mixes.count=[4']}, r'--set=mixes\.count=\[4: '),
    ({'benchmarks': ['best_of'], 'set': ['best_of.plans=1']}, 'plans'),
    ({'benchmarks': ['mixes'], 'set': ['mixes.counts=4']}, "'counts'|'count'"),
    ({'benchmarks': ['mixes'], 'set': ['mixes.count=[']}, 'mixes.count=.: the value is not YAML'),
    ({'step': '500,last'}, '--step=500,last'),
    ({'step': 'all'}, '/no/such/run has no checkpoint'),
    ({'step': 'all', 'workdir': ['assets:tiny']}, 'assets:tiny is a file of weights'),
  ],
)
def test_mistakes_are_named_before_anything_is_loaded(command, settings, message):
  command.workdir = ['/no/such/run']
  vars(command).update(settings)
  command.load_fails = True
  with pytest.raises(UserError, match=message):
    evaluate.main()


def test_several_runs_have_a_table_and_a_folder_each(command, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  command.workdir = ['runs/a', 'b.safetensors']
  evaluate.main()
  output = capsys.readouterr().out
  assert output.index('table of a\nwrote runs/a') < output.index('table of b.safetensors')
  names = sorted(path.name for path in (tmp_path / 'runs/a/evaluation').iterdir())
  assert [name for name in names if '-compared-' in name] == names[-1:] and len(names) == 3
  assert len(list((tmp_path / 'evaluation').iterdir())) == 2


def test_several_steps_of_several_runs_give_curves(command, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(convergence.weights_io, 'steps_of', lambda workdir: [5, 10, 20])

  def checkpoints(subject, workdir, weights, steps):
    for step in steps:
      subject.stage = types.SimpleNamespace(samples=True)
      yield step, subject

  monkeypatch.setattr(convergence, 'checkpoints', checkpoints)
  command.workdir, command.step, command.out = ['runs/a', 'runs/b'], '5,20', str(tmp_path)
  evaluate.main()
  assert command.evaluated == ['a', 'a', 'b', 'b']
  (path,) = tmp_path.glob('convergence-*.json')
  runs = json.loads(path.read_text())['runs']
  assert {name: list(run['checkpoints']) for name, run in runs.items()} == {
    'runs/a': ['5', '20'],
    'runs/b': ['5', '20'],
  }
  assert '== runs/b, step 20' in capsys.readouterr().out


def test_evaluators_are_checked_against_all_runs_before_sampling(command, tmp_path, fake_subject):
  command.subjects['b'] = fake_subject(None, task='classes')
  command.workdir, command.out, command.benchmarks = ['a', 'b'], str(tmp_path), ['retrieval']
  with pytest.raises(UserError, match='retrieval .*classes'):
    evaluate.main()
  assert not command.evaluated and not list(tmp_path.iterdir())


def test_the_folder_is_checked_before_sampling_and_the_table_is_printed_before_writing(
  command, tmp_path, capsys, monkeypatch
):
  (tmp_path / 'file').write_text('x')
  command.workdir, command.out = ['runs/a'], str(tmp_path / 'file')
  with pytest.raises(UserError, match='cannot write to'):
    evaluate.main()
  assert not command.evaluated
  monkeypatch.setattr(evaluate.front_door, 'check_folder', lambda folder: None)
  with pytest.raises(UserError, match='cannot write'):
    evaluate.main()
  assert 'table of a' in capsys.readouterr().out
