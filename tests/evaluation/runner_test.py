"""The runner: reports, tables and files."""

import dataclasses
import json
import pathlib
import zlib

import numpy as np
import pytest
from PIL import Image

from vpe_jax.contracts import UserError
from vpe_jax.data.records import render
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation import intervals, retrieval, runner
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import FROM_DRAFTS, RECONSTRUCTED, Report, Row

_RETRIEVAL = retrieval.Retrieval(captions=12, splits=('combination',), seed=1)


class _Network:
  """An evaluator network that recognizes only ground-truth images."""

  fingerprint = 'knowing'

  def __init__(self):
    trials, records = retrieval.make_trials(12, 'combination', 1)
    self._captions = {render(r, 16).tobytes(): t.caption for r, t in zip(records, trials)}

  def captions(self, captions):
    seeds = [np.random.default_rng(zlib.crc32(c.encode())) for c in captions]
    vectors = np.stack([seed.normal(size=256) for seed in seeds])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

  def images(self, images):
    return self.captions([self._captions.get(image.tobytes(), 'unknown') for image in images])


@pytest.fixture
def subject(monkeypatch, fake_subject):
  monkeypatch.setattr(EvaluatorNetwork, 'load', lambda source: _Network())
  gray = lambda prompts: np.full((len(prompts), 16, 16, 3), 128, np.uint8)
  return fake_subject(gray, from_drafts=lambda _, images: images, reconstruct=gray)


@pytest.fixture
def report(subject):
  return _RETRIEVAL.run(subject)


def test_report_has_true_generated_and_permuted_rows(report):
  results = report.protocol['results']['combination']
  accuracy = {name: row['accuracy']['value'] for name, row in results['rows'].items()}
  assert list(accuracy) == [
    'ground truth',
    'ground truth, captions permuted',
    'ground truth through the codec',
    'generated',
    'generated, captions permuted',
    FROM_DRAFTS,
  ]
  assert accuracy['ground truth'] == accuracy[FROM_DRAFTS] == 1
  assert accuracy['generated'] == accuracy[RECONSTRUCTED] < 0.3
  assert accuracy['ground truth, captions permuted'] < 0.3
  assert results['generated_over_true'] == accuracy['generated']
  assert len(results['captions']) == 12 and results['captions'][0]['true'] == 1
  assert report.numbers == {
    'retrieval/combination/accuracy': accuracy['generated'],
    'retrieval/combination/true_drafts/accuracy': 1,
  }
  assert list(results['bars'].values())[:2] == [True, False]
  assert report.protocol['candidates'] == 32 and report.protocol['hard_distractors'] == 16
  assert report.protocol['captions'] == 12 and report.protocol['seed'] == 1
  assert report.protocol['evaluator_network_checkpoint'] == 'knowing'
  assert report.protocol['subject'] == {'checkpoint': 'abc'}


def test_save_writes_json_and_a_sheet_for_each_split(report, tmp_path):
  path, *sheets = runner.save({'retrieval': report}, str(tmp_path / 'evaluation'), 'abc')
  assert sheets and all(pathlib.Path(sheet).exists() for sheet in sheets)
  assert path == str(tmp_path / 'evaluation' / 'retrieval-abc.json')
  saved = json.loads(pathlib.Path(path).read_text())
  assert saved == json.loads(json.dumps(report.protocol))
  with Image.open(tmp_path / 'evaluation' / 'retrieval-abc-combination.png') as sheet:
    assert sheet.width > 8 * 16
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write .*file'):
    runner.save({'retrieval': report}, str(tmp_path / 'file'), 'abc')


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('retrival', {}, "did you mean 'retrieval'"),
    ('retrieval', {'caption': 3}, "did you mean 'captions'"),
    ('retrieval', {'splits': ('combinations',)}, "did you mean 'combination'"),
    ('retrieval', {'captions': 1}, 'captions is 1'),
    ('retrieval', {'seed': -1}, 'seed is -1'),
    ('heldout', {'batches': 0}, 'batches is 0'),
  ],
)
def test_mistakes_in_options_are_named(name, options, message):
  with pytest.raises(UserError, match=message):
    evaluators.build(name, options)


def test_every_evaluator_builds_with_its_defaults():
  for name in evaluators.names():
    if name != 'ocr':  # its packages are optional
      assert isinstance(evaluators.build(name, {}), evaluators.class_of(name))


@pytest.mark.parametrize('name, message', [('ocr', 'captions'), ('edits', 'does not edit')])
def test_an_evaluator_that_does_not_fit_is_rejected(subject, monkeypatch, name, message):
  evaluator = evaluators.class_of(name)()
  with pytest.raises(UserError, match=message):
    runner.select({name: evaluator}, subject, {})


def test_the_default_evaluator_follows_from_the_kind_of_prompts(subject, fake_subject):
  (name, evaluator), *rest = runner.select({}, subject, {'captions': 7, 'plans': 3}).items()
  assert name == 'retrieval' and evaluator.captions == 7 and not rest
  assert list(runner.select({}, fake_subject(None, task='classes'), {})) == ['classes']


def test_without_accuracy_on_ground_truth_images_the_table_makes_no_claim():
  zero = retrieval.Result(np.zeros(3), np.zeros(3), {}, np.zeros((3, 2)))
  lines = retrieval.table('combination', {'ground truth': zero, 'generated': zero})
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
  rows = ('ground truth', 'ground truth, captions permuted', 'generated', 'generated, permuted')
  results = (retrieval.Result(np.full(4, a), np.zeros(4), {}, np.zeros((4, 2))) for a in accuracies)
  assert tuple(retrieval.verdict(dict(zip(rows, results))).values()) == bars


def test_file_names_depend_on_settings_and_options(subject):
  stems = set()
  for settings in ('1', '2'):
    subject.description = {'checkpoint': 'abc', 'settings': settings}
    for seed in (1, 2):
      built = {'retrieval': dataclasses.replace(_RETRIEVAL, seed=seed)}
      stems.add(runner.stem(subject, built))
      assert runner.stem(subject, built) in stems
  assert len(stems) == 4 and all(stem.startswith('abc-') for stem in stems)


def test_evaluate_prints_notes_and_writes_reports(subject, tmp_path, capsys):
  subject.notes = ('trained on folder:mine',)
  built = {'a run': {'retrieval': _RETRIEVAL}}
  runner.evaluate(built, {'a run': subject}, {'a run': str(tmp_path)})
  assert 'trained on folder:mine' in capsys.readouterr().out
  (path,) = tmp_path.glob('retrieval-*.json')
  assert json.loads(path.read_text())['notes'] == ['trained on folder:mine']


def test_runs_with_the_same_prompts_have_paired_differences(tmp_path, capsys):
  values = np.random.default_rng(0).random(50)
  report = lambda shift, items: Report(
    {'edits/x': intervals.mean(values + shift)}, protocol={}, items=items
  )
  reports = {'a': {'edits': report(0, 'x')}, 'b': {'edits': report(0.25, 'x')}}
  figure = runner.paired(reports)['edits']['b minus a']['edits/x']
  # Each image differs by the same, so the interval is narrow, unlike those of the two means.
  assert figure.interval == pytest.approx((0.25, 0.25))
  (path,) = runner.save_combined(reports, str(tmp_path), ['x', 'y'])
  saved = json.loads(pathlib.Path(path).read_text())
  assert saved['b minus a']['edits/x']['value'] == pytest.approx(0.25)
  assert runner.paired(reports | {'b': {'edits': report(0, 'other')}}) == {}


def test_combined_sheets_replace_only_those_of_the_same_runs(tmp_path):
  row = lambda label, shade: Row(label, np.full((2, 16, 16, 3), shade, np.uint8))
  sheet = lambda shade: (row('true', 0), row('generated', shade))
  reports = {
    'a': {'retrieval': Report({}, protocol={'a': 1}, sheets={'concept': sheet(1)})},
    'b': {'retrieval': Report({}, sheets={'concept': sheet(2), 'combination': sheet(2)})},
  }
  (path,) = runner.save_combined(reports, str(tmp_path), ['x', 'y'])
  assert pathlib.Path(path).name.startswith('retrieval-compared-') and path.endswith('-concept.png')
  single = runner.save(reports['a'], str(tmp_path), 'x')
  with Image.open(path) as combined, Image.open(single[1]) as sheet_of_one:
    assert combined.height > sheet_of_one.height
  (second,) = runner.save_combined(reports, str(tmp_path), ['x', 'z'])
  assert second != path and runner.save_combined({'a': reports['a']}, str(tmp_path), ['x']) == []
