"""The benchmark of edits: what counts as done, controls, and what is asked for."""

import json

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.evaluation import editing, runner
from vpe_jax.evaluation.judge import Judge
from vpe_jax.evaluation.report import Options, Planner, Subject
from vpe_jax.sampling.plans import Codebook, Plans

OPTIONS = Options(captions=16, splits=('combination',), seed=1)


def _embed(images):
  """A unit vector that says which picture it is, by its levels."""
  flat = images.reshape(len(images), -1) - 128.0
  return flat / np.linalg.norm(flat, axis=1, keepdims=True)


class _Judge:
  fingerprint = 'knowing'
  images = staticmethod(_embed)


@pytest.fixture(scope='module')
def asked():
  return editing.make_edits(OPTIONS.captions, 'combination', OPTIONS.seed, 32)


def test_edits_are_held_out_and_told_differently(asked):
  assert len(set(asked.told)) == OPTIONS.captions
  assert set(asked.kinds) <= {'add', 'remove', 'recolour', 'replace', 'move'}
  assert asked.mask.any((1, 2)).all() and asked.before.shape == (OPTIONS.captions, 32, 32, 3)
  np.testing.assert_array_equal(asked.before[~asked.mask], asked.after[~asked.mask])
  assert (asked.before[asked.mask] != asked.after[asked.mask]).any(-1).all()


def test_the_picture_after_is_done_and_the_one_before_is_not(asked):
  done, copied = (editing.measure(x, asked, _embed) for x in (asked.after, asked.before))
  assert done.done.all() and done.close.all() and done.like_after.all()
  assert done.error_inside == done.error_outside == 0
  assert not copied.done.any() and not copied.close.any() and not copied.like_after.any()
  apart = np.square(asked.after.astype(float) - asked.before)[asked.mask].mean()
  assert copied.error_inside == pytest.approx(apart, rel=1e-5) and copied.error_outside == 0
  summary = json.loads(json.dumps(done.summary(asked.kinds)))
  assert summary['psnr_inside'] is None and summary['done']['share'] == 1
  assert sum(kind['done']['share'] * kind['edits'] for kind in summary['kinds'].values()) == 16


def test_more_than_half_of_the_way_is_done_and_close(asked):
  for way in (0.4, 0.6):
    part = np.rint(asked.before + way * (asked.after - asked.before.astype(float)))
    result = editing.measure(part.astype(np.uint8), asked, _embed)
    assert result.done.mean() == result.close.mean() == (way > 0.5)


def test_half_of_noise_is_done_and_none_of_it_is_close():
  asked = editing.make_edits(128, 'combination', 0, 16)
  noise = np.random.default_rng(0).integers(0, 256, asked.before.shape, np.uint8)
  result = editing.measure(noise, asked, _embed)
  assert 0.3 < result.done.mean() < 0.7 and result.close.mean() < 0.05


def test_what_is_spoilt_outside_shows_there_alone(asked):
  spoilt = np.where(asked.mask[..., None], asked.after, asked.after ^ 10)
  result = editing.measure(spoilt, asked, _embed)
  assert result.done.all() and result.error_inside == 0 and result.error_outside > 0
  spoilt = np.where(asked.mask[..., None], asked.after, 255 - asked.after)
  assert editing.measure(spoilt, asked, _embed).close.all()
  half = np.where(asked.mask[..., None], asked.before, asked.after)
  half[:8] = asked.after[:8]
  assert editing.measure(half, asked, _embed).done.tolist() == [True] * 8 + [False] * 8


def test_the_table_tells_kinds_apart():
  done, kinds = np.array([True, True, False, False]), np.array(['add', 'add', 'add', 'move'])
  result = editing.Result(done, done, done, 1.0, 1.0)
  said = editing.table('concept', {editing.COPY: result, 'generated': result}, kinds)[-1]
  assert said.endswith('done, by kind (generated): add 67% of 3, move 0% of 1')


def _subject(size=32):
  """It copies; of the true plan it draws the picture after: a plan is the picture's number."""

  def editor(before):
    known = {}

    def read(pictures, told):
      known.update(enumerate(pictures))
      codes = np.arange(len(pictures))[:, None]
      return Plans(codes, tuple(told), (0,) * len(told), Codebook(64, 'abc'), {})

    render = lambda plans: np.stack([known[code] for code in plans.codes[:, 0]])
    planner = Planner(None, None, render, read, ())
    return Subject(lambda told: before, size, {'checkpoint': 'abc'}, planner)

  refuse = lambda told: pytest.fail('drawn without a picture')
  return Subject(refuse, size, {'checkpoint': 'abc'}, task='edits', editing=editor)


def test_the_report_tells_copies_and_true_plans_apart(monkeypatch):
  monkeypatch.setattr(Judge, 'load', lambda source: _Judge())
  report = runner.run([], _subject(), OPTIONS)['edits']
  found = report.protocol['results']['combination']
  done = {name: row['done']['share'] for name, row in found['rows'].items()}
  own = ['generated', editing.OTHERS, 'generated on the true plan']
  assert list(done) == [editing.COPY, editing.NOISE, *own]
  assert done[editing.COPY] == done['generated'] == 0 and done['generated on the true plan'] == 1
  assert found['rows']['generated']['psnr_outside'] is None
  assert found['rows'][editing.OTHERS]['error_outside'] > 0
  assert len(report.lines) == 8 and ' inf ' in report.lines[2] and '0% / 100% of' in report.lines[7]
  labels = [row.label for row in report.sheets['combination']]
  assert labels == ['before', 'target', 'generated', 'generated on the true plan']
  assert report.sheets['combination'][0].said[0] == found['edits'][0]['told']
  json.dumps(report.protocol, allow_nan=False)


def test_more_instructions_than_there_are_is_an_error(monkeypatch):
  monkeypatch.setattr(editing, '_POOL', 0)
  with pytest.raises(UserError, match='--captions=300, and 256 records'):
    editing.make_edits(300, 'combination', 0, 8)
