"""Convergence curves: the same numbers as one checkpoint alone, compiled once, in JSON and PNG."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from vpe_jax.checkpoints import model as model_lib
from vpe_jax.contracts import Generated, Samples, UserError
from vpe_jax.evaluation import convergence, intervals, plots
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.evaluation.heldout import HeldOut
from vpe_jax.evaluation.report import Report
from vpe_jax.evaluation.sample_grid import SampleGrid
from vpe_jax.training import curves, loop, metrics


@dataclasses.dataclass
class Brightness:
  """An evaluator of the brightness of images by the generator."""

  requires = (Samples,)

  def run(self, subject):
    images = subject.sample(['a fox', 'a dog'])
    return Report({'brightness': intervals.mean(images.mean((1, 2, 3)))})


@pytest.fixture
def run(drawing_system, tmp_path, monkeypatch):
  """A run with checkpoints of steps 2, 4 and 6, whose first stage samples no images.

  Its images show a parameter that trains. `traces` counts how often sampling is traced.
  """

  class Learning(type(drawing_system())):
    """A DrawingSystem whose brightness trains."""

    stages = (
      dataclasses.replace(drawing_system().stages[0], samples=False),
      drawing_system().stages[1],
    )
    sampling_networks = draft_encoders = ()
    traces = 0

    def generate(self, params, frozen, request, rng, settings):
      Learning.traces += 1
      generated = super().generate(params, frozen, request, rng, settings)
      latents = generated.encoded['latents'] + params['head']['bias'][0]
      encoded = {**generated.encoded, 'latents': latents}
      return Generated(self.decode(frozen, encoded, rng), encoded)

  made = drawing_system(checkpoint={'every': 2, 'keep': 3}, evals={'sample_grid': {'every': 4}})
  build = lambda *_: Learning(made.config, made.frozen)
  monkeypatch.setattr(model_lib.systems, 'build', build)
  workdir = str(tmp_path / 'run')
  loop.train(made.config, build(), workdir)
  return workdir, Learning


def test_numbers_of_all_checkpoints_are_those_of_each_alone(run, tmp_path, capsys):
  workdir, system = run
  steps = convergence.choose_steps(workdir, convergence.ALL)
  assert steps == [2, 4, 6]
  load = lambda step: Subject.load(workdir, 'ema', 8, 0, {}, step)
  brightness = Brightness()
  grid = SampleGrid()
  built = {'heldout': HeldOut(batches=2), 'sample_grid': grid, 'brightness': brightness}
  system.traces = 0
  pairs = convergence.checkpoints(load(6), workdir, 'ema', steps)
  convergence.evaluate({'a': built}, {'a': pairs}, str(tmp_path / 'out'))
  # The grid has two requests, with own and ground-truth drafts, and the generator one. Steps 4 and
  # 6 share the programs.
  assert system.traces == 3
  (path,) = (tmp_path / 'out').glob('convergence-*.json')
  record = json.loads(path.read_text())['runs']['a']
  numbers = record['numbers']
  assert 'eval/tokens' in numbers and 'sample/own/latent_distance' in numbers
  for name, points in numbers.items():
    assert [point['step'] for point in points] == ([2, 4, 6] if name.startswith('eval') else [4, 6])
  assert len({point['value'] for point in numbers['sample/own/latent_distance']}) == 2
  for step in steps:
    alone = load(step)
    assert record['checkpoints'][str(step)] == alone.description['checkpoint']
    expected = dict(HeldOut(batches=2).run(alone).figures)
    if step > 2:
      expected |= {**SampleGrid().run(alone).figures, **brightness.run(alone).figures}
    found = {
      name: {key: point[key] for key in ('value', 'interval95')}
      for name, points in numbers.items()
      for point in points
      if point['step'] == step
    }
    assert found == {name: figure.summary() for name, figure in expected.items()}
  assert 'sample_grid: none; no images are sampled in stage head' in capsys.readouterr().out
  with Image.open(path.with_suffix('.png')) as image:
    assert image.height >= 260


def test_the_loop_records_numbers_with_their_intervals(run):
  workdir, _ = run
  (at_4, at_6) = [r for r in metrics.read(workdir) if 'sample/own/latent_distance' in r]
  assert (at_4['step'], at_6['step']) == (4, 6)
  name = 'sample/own/latent_distance'
  for record in (at_4, at_6):
    assert f'{name}/low95' in record
    assert record[f'{name}/low95'] < record[name] < record[f'{name}/high95']
  panels = {panel.title: panel for panel in curves.make_panels(metrics.read(workdir))}
  assert [step for step, *_ in panels[name].curves[0].band] == [4, 6]


def test_steps_are_parsed_and_checked_against_the_run(run):
  assert convergence.parse_steps(None) is None and convergence.parse_steps('7') == (7,)
  assert convergence.parse_steps('1000,500,500') == (500, 1000)
  for text in ('some', '5,', '-1'):
    with pytest.raises(UserError, match=f'--step={text}'):
      convergence.parse_steps(text)
  workdir, _ = run
  assert convergence.choose_steps(workdir, (2, 6)) == [2, 6]
  with pytest.raises(UserError, match='step 3, 5; steps: 2, 4, 6'):
    convergence.choose_steps(workdir, (2, 3, 5))
  with pytest.raises(UserError, match='file of weights'):
    convergence.choose_steps('assets:tiny', convergence.ALL)
  with pytest.raises(UserError, match='has no checkpoint yet'):
    convergence.choose_steps(f'{workdir}/nothing', convergence.ALL)


def test_values_that_are_not_finite_are_left_out():
  none, point = {'value': None, 'interval95': None}, {'value': 2.0, 'interval95': [1.0, 3.0]}
  numbers = {'loss': [{'step': 1, **none}, {'step': 2, **point}], 'gone': [{'step': 1, **none}]}
  (panel,) = convergence.make_panels({'a': convergence.Run({}, {}, numbers=numbers)})
  assert panel.title == 'loss' and panel.curves[0].points == [(2, 2.0)]
  plots.render([panel])


def test_several_runs_share_a_panel():
  point = lambda step, value: {'step': step, 'value': value, 'interval95': [value - 1, value + 1]}
  results = {
    name: convergence.Run(
      {}, {}, numbers={'x/own/y': [point(1, 2.0)], 'x/true_drafts/y': [point(1, 3.0)]}
    )
    for name in ('a', 'b')
  }
  (panel,) = convergence.make_panels(results)
  assert panel.title == 'x/y'
  assert [curve.label for curve in panel.curves] == [
    'a',
    'a, ground-truth drafts',
    'b',
    'b, ground-truth drafts',
  ]
  assert panel.curves[1].points == [(1, 3.0)] and panel.curves[1].band == ((1, 2.0, 4.0),)
