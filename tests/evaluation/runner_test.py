"""The runner: reports, tables and what is written."""

import dataclasses
import json
import pathlib
import zlib

import numpy as np
import pytest
from PIL import Image

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.records import render
from vpe_jax.evaluation import retrieval, runner
from vpe_jax.evaluation.judge import Judge
from vpe_jax.evaluation.report import Options, Report, Row, Subject

_OPTIONS = Options(captions=12, splits=('combination',), seed=1)


class _Knowing:
  """A judge that recognises the true pictures and none else."""

  fingerprint = 'knowing'

  def __init__(self):
    trials, records = retrieval.make_trials(12, 'combination', 1)
    self._known = {render(r, 16).tobytes(): t.caption for r, t in zip(records, trials)}

  def captions(self, captions):
    seeds = [np.random.default_rng(zlib.crc32(c.encode())) for c in captions]
    vectors = np.stack([seed.normal(size=256) for seed in seeds])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

  def images(self, images):
    return self.captions([self._known.get(image.tobytes(), 'unknown') for image in images])


@pytest.fixture
def subject(monkeypatch):
  monkeypatch.setattr(Judge, 'load', lambda source: _Knowing())
  gray = lambda captions: np.full((len(captions), 16, 16, 3), 128, np.uint8)
  return Subject(gray, 16, {'checkpoint': 'abc'})


def test_report_tells_true_generated_and_permuted_apart(subject):
  report = runner.run(['retrieval'], subject, _OPTIONS)['retrieval']
  found = report.protocol['results']['combination']
  assert list(found['rows']) == [
    'true images',
    'true images, captions permuted',
    'generated',
    'generated, captions permuted',
  ]
  assert found['rows']['true images']['accuracy'] == 1
  assert found['rows']['generated']['accuracy'] < 0.3
  assert found['rows']['true images, captions permuted']['accuracy'] < 0.3
  assert found['generated_over_true'] == found['rows']['generated']['accuracy']
  assert len(found['captions']) == 12 and found['captions'][0]['true'] == 1
  assert len(report.lines) == 11 and '100.0%' in report.lines[2]
  assert list(found['bars'].values())[:2] == [True, False]


def test_protocol_says_how_it_was_measured(subject):
  protocol = runner.run(['retrieval'], subject, _OPTIONS)['retrieval'].protocol
  assert protocol['candidates'] == 32 and protocol['hard_distractors'] == 16
  assert protocol['captions'] == 12 and protocol['seed'] == 1
  assert protocol['judge_checkpoint'] == 'knowing'
  assert protocol['subject'] == {'checkpoint': 'abc'}


def test_saves_json_and_a_sheet_for_each_split(subject, tmp_path):
  reports = runner.run(['retrieval'], subject, _OPTIONS)
  path, *sheets = runner.save(reports, str(tmp_path / 'evaluation'), 'abc')
  assert sheets and all(pathlib.Path(sheet).exists() for sheet in sheets)
  assert path == str(tmp_path / 'evaluation' / 'retrieval-abc.json')
  assert json.loads(pathlib.Path(path).read_text()) == json.loads(
    json.dumps(reports['retrieval'].protocol)
  )
  sheet = Image.open(tmp_path / 'evaluation' / 'retrieval-abc-combination.png')
  assert sheet.width > 8 * 16
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    runner.save(reports, str(tmp_path / 'file'), 'abc')


@pytest.mark.parametrize(
  'names, change, message',
  [
    (['retrival'], {}, "did you mean 'retrieval'"),
    (['retrieval'], {'splits': ('combinations',)}, "did you mean 'combination'"),
    (['retrieval'], {'captions': 1}, 'at least 2'),
    (['best_of'], {'best_of': 1}, 'best_of is 1: at least 2 plans'),
    (['mixes'], {'mixes': 1}, 'mixes is 1: at least 2'),
    (['best_of'], {'best_of': 2}, 'draws without visual prompts'),
    (['ocr'], {}, 'ocr asks for written words, and this model draws what captions say: it has ret'),
    (['retrieval'], {'seed': -1}, 'seed is -1: choose one from 0 to 2147483647'),
  ],
)
def test_mistakes_are_named(subject, names, change, message):
  with pytest.raises(UserError, match=message):
    runner.run(names, subject, dataclasses.replace(_OPTIONS, **change))


def test_where_the_judge_knows_nothing_no_share_is_claimed():
  zero = retrieval.Result(np.zeros(3), np.zeros(3), {}, None, 3)
  found = {'true images': zero, 'generated': zero}
  lines = runner.table('combination', found)
  assert 'says nothing about generated ones' in lines[-1]
  assert not [line for line in lines if 'reach' in line]


@pytest.mark.parametrize(
  'accuracies, bars',
  [
    ((0.60, 0.03, 0.30, 0.03), (True, True, True, True)),
    ((0.59, 0.03, 0.30, 0.04), (False, True, True, False)),
    ((0.60, 0.04, 0.29, 0.03), (True, False, True, False)),
    ((0.60, 0.03, 0.09, 0.03), (True, False, False, True)),
  ],
)
def test_the_bars_of_the_protocol(accuracies, bars):
  rows = ('true images', 'true images, captions permuted', 'generated', 'generated, permuted')
  results = (retrieval.Result(np.full(4, a), np.zeros(4), {}, None, 4) for a in accuracies)
  found = runner.verdict(dict(zip(rows, results)))
  assert tuple(found.values()) == bars
  assert any('9.4%' in bar for bar in found) and any('3.1%' in bar for bar in found)


def test_other_settings_and_options_are_other_files(subject):
  names = {
    runner.stem(dataclasses.replace(subject, description=described), options)
    for described in ({'checkpoint': 'abc', 'settings': str(n)} for n in range(2))
    for options in (_OPTIONS, dataclasses.replace(_OPTIONS, seed=2))
  }
  assert len(names) == 4 and all(name.startswith('abc-') for name in names)
  assert runner.stem(subject, _OPTIONS) == runner.stem(subject, dataclasses.replace(_OPTIONS))


@pytest.mark.parametrize(
  'task, name',
  [('captions', 'retrieval'), ('edits', 'edits'), ('classes', 'classes'), ('words', 'ocr')],
)
def test_what_is_drawn_chooses_the_benchmark(subject, monkeypatch, task, name):
  ready = {one: dataclasses.replace(b, ready=lambda: None) for one, b in runner.BENCHMARKS.items()}
  monkeypatch.setattr(runner, 'BENCHMARKS', ready)
  of_task = dataclasses.replace(subject, task=task)
  assert runner.chosen([], of_task) == runner.chosen([name], of_task) == [name]


@pytest.mark.parametrize('source, said', [('folder:mine', True), ('scenes', False)])
def test_a_run_on_other_data_is_told_apart(subject, tmp_path, capsys, source, said):
  one = dataclasses.replace(subject, data=DataConfig(source=source))
  runner.evaluate(['retrieval'], {'a run': one}, _OPTIONS, {'a run': str(tmp_path)})
  assert ('it was trained on folder:mine' in capsys.readouterr().out) == said
  (written,) = tmp_path.glob('retrieval-*.json')
  assert len(json.loads(written.read_text())['notes']) == said


def test_sheets_of_several_runs_are_put_together_and_replace_no_other(tmp_path):
  row = lambda label, shade: Row(label, np.full((2, 16, 16, 3), shade, np.uint8))
  sheet = lambda shade: (row('true', 0), row('generated', shade))
  reports = {
    'a': {'retrieval': Report((), {}, {'concept': sheet(1)})},
    'b': {'retrieval': Report((), {}, {'concept': sheet(2), 'combination': sheet(2)})},
  }
  (path,) = runner.save_together(reports, str(tmp_path), ['x', 'y'])
  assert pathlib.Path(path).name.startswith('retrieval-compared-') and path.endswith('-concept.png')
  single = runner.save(reports['a'], str(tmp_path), 'x')
  with Image.open(path) as of_all, Image.open(single[1]) as of_one:
    assert of_all.height > of_one.height
  (other,) = runner.save_together(reports, str(tmp_path), ['x', 'z'])
  assert other != path and runner.save_together({'a': reports['a']}, str(tmp_path), ['x']) == []
