"""The benchmark of edits: what counts as done, controls, and what is fields for."""

import json

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.evaluation import editing
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork

BENCHMARK = editing.EditBenchmark(captions=16, splits=('combination',), seed=1)


def _embed(images):
  """A unit vector that says which picture it is, by its levels."""
  flat = images.reshape(len(images), -1) - 128.0
  return flat / np.linalg.norm(flat, axis=1, keepdims=True)


class _Judge:
  fingerprint = 'knowing'
  images = staticmethod(_embed)


@pytest.fixture(scope='module')
def fields():
  return editing.make_edits(BENCHMARK.captions, 'combination', BENCHMARK.seed, 32)


def test_edits_are_held_out_and_told_differently(fields):
  assert len(set(fields.instructions)) == BENCHMARK.captions
  assert set(fields.kinds) <= {'add', 'remove', 'recolour', 'replace', 'move'}
  assert fields.mask.any((1, 2)).all() and fields.source.shape == (BENCHMARK.captions, 32, 32, 3)
  np.testing.assert_array_equal(fields.source[~fields.mask], fields.target[~fields.mask])
  assert (fields.source[fields.mask] != fields.target[fields.mask]).any(-1).all()


def test_the_picture_after_is_done_and_the_one_before_is_not(fields):
  done, copied = (editing.measure(x, fields, _embed) for x in (fields.target, fields.source))
  assert done.done.all() and done.close.all() and done.like_after.all()
  assert done.error_inside == done.error_outside == 0
  assert not copied.done.any() and not copied.close.any() and not copied.like_after.any()
  apart = np.square(fields.target.astype(float) - fields.source)[fields.mask].mean()
  assert copied.error_inside == pytest.approx(apart, rel=1e-5) and copied.error_outside == 0
  summary = json.loads(json.dumps(done.summary(fields.kinds)))
  assert summary['psnr_inside'] is None and summary['done']['share'] == 1
  assert sum(kind['done']['share'] * kind['edits'] for kind in summary['kinds'].values()) == 16


def test_more_than_half_of_the_way_is_done_and_close(fields):
  for way in (0.4, 0.6):
    part = np.rint(fields.source + way * (fields.target - fields.source.astype(float)))
    result = editing.measure(part.astype(np.uint8), fields, _embed)
    assert result.done.mean() == result.close.mean() == (way > 0.5)


def test_half_of_noise_is_done_and_none_of_it_is_close():
  fields = editing.make_edits(128, 'combination', 0, 16)
  noise = np.random.default_rng(0).integers(0, 256, fields.source.shape, np.uint8)
  result = editing.measure(noise, fields, _embed)
  assert 0.3 < result.done.mean() < 0.7 and result.close.mean() < 0.05


def test_what_is_spoilt_outside_shows_there_alone(fields):
  spoilt = np.where(fields.mask[..., None], fields.target, fields.target ^ 10)
  result = editing.measure(spoilt, fields, _embed)
  assert result.done.all() and result.error_inside == 0 and result.error_outside > 0
  spoilt = np.where(fields.mask[..., None], fields.target, 255 - fields.target)
  assert editing.measure(spoilt, fields, _embed).close.all()
  half = np.where(fields.mask[..., None], fields.source, fields.target)
  half[:8] = fields.target[:8]
  assert editing.measure(half, fields, _embed).done.tolist() == [True] * 8 + [False] * 8


def test_the_table_tells_kinds_apart():
  done, kinds = np.array([True, True, False, False]), np.array(['add', 'add', 'add', 'move'])
  result = editing.Result(done, done, done, 1.0, 1.0)
  said = editing.table('concept', {editing.COPY: result, 'generated': result}, kinds)[-1]
  assert said.endswith('done, by kind (generated): add 67% of 3, move 0% of 1')


def test_the_report_separates_copies_from_true_drafts(monkeypatch, fake_subject):
  monkeypatch.setattr(EvaluatorNetwork, 'load', lambda source: _Judge())
  edit = lambda source: fake_subject(
    lambda prompts: source, image_size=32, from_true_drafts=lambda prompts, images: images
  )
  refuse = lambda prompts: pytest.fail('sampled without a source image')
  subject = fake_subject(
    refuse, image_size=32, task='edits', editing=edit, from_true_drafts=lambda *_: None
  )
  report = BENCHMARK.run(subject)
  results = report.protocol['results']['combination']
  done = {name: row['done']['share'] for name, row in results['rows'].items()}
  own = ['generated', editing.OTHERS, editing.FROM_TRUE]
  assert list(done) == [editing.COPY, editing.NOISE, *own]
  assert done[editing.COPY] == done['generated'] == 0 and done[editing.FROM_TRUE] == 1
  assert report.numbers['edits/combination/done'] == 0
  assert results['rows']['generated']['psnr_outside'] is None
  assert results['rows'][editing.OTHERS]['error_outside'] > 0
  assert len(report.lines) == 8 and ' inf ' in report.lines[2] and '0% / 100% of' in report.lines[7]
  labels = [row.label for row in report.sheets['combination']]
  assert labels == ['source', 'target', 'generated', editing.FROM_TRUE]
  assert report.sheets['combination'][0].captions[0] == results['edits'][0]['told']
  json.dumps(report.protocol, allow_nan=False)


def test_more_instructions_than_there_are_is_an_error(monkeypatch):
  monkeypatch.setattr(editing, '_POOL', 0)
  with pytest.raises(UserError, match='captions is 300, and 256 records'):
    editing.make_edits(300, 'combination', 0, 8)
