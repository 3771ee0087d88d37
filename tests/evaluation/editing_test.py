"""The benchmark of edits: metrics, controls and the report."""

import json

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.evaluation import editing
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import FROM_DRAFTS

BENCHMARK = editing.EditBenchmark(captions=16, splits=('combination',), seed=1)


def _embed(images):
  """Unit vectors of the pixel levels."""
  flat = images.reshape(len(images), -1) - 128.0
  return flat / np.linalg.norm(flat, axis=1, keepdims=True)


class _Network:
  """An evaluator network whose vectors encode the pixels."""

  fingerprint = 'knowing'
  images = staticmethod(_embed)


@pytest.fixture(scope='module')
def held_out():
  return editing.make_edits(BENCHMARK.captions, 'combination', BENCHMARK.seed, 32)


def test_edits_have_distinct_instructions_and_exact_masks(held_out):
  assert len(set(held_out.instructions)) == BENCHMARK.captions
  assert set(held_out.kinds) <= {'add', 'remove', 'recolour', 'replace', 'move'}
  assert held_out.source.shape == (BENCHMARK.captions, 32, 32, 3)
  assert held_out.mask.any((1, 2)).all()
  np.testing.assert_array_equal(held_out.source[~held_out.mask], held_out.target[~held_out.mask])
  assert (held_out.source[held_out.mask] != held_out.target[held_out.mask]).any(-1).all()


def test_the_target_counts_as_done_and_the_source_does_not(held_out):
  done, copied = (editing.measure(x, held_out, _embed) for x in (held_out.target, held_out.source))
  assert done.done.all() and done.close.all() and done.resembles_target.all()
  assert done.error_inside == done.error_outside == 0
  assert not copied.done.any() and not copied.close.any() and not copied.resembles_target.any()
  expected = np.square(held_out.target.astype(float) - held_out.source)[held_out.mask].mean()
  assert copied.error_inside == pytest.approx(expected, rel=1e-5) and copied.error_outside == 0
  summary = json.loads(json.dumps(done.summary(held_out.kinds)))
  assert summary['psnr_inside'] is None and summary['done']['share'] == 1
  assert sum(kind['done']['share'] * kind['edits'] for kind in summary['kinds'].values()) == 16


def test_results_nearer_to_the_target_are_done_and_close(held_out):
  for share in (0.4, 0.6):
    blend = np.rint(held_out.source + share * (held_out.target - held_out.source.astype(float)))
    result = editing.measure(blend.astype(np.uint8), held_out, _embed)
    assert result.done.mean() == result.close.mean() == (share > 0.5)


def test_about_half_of_noise_images_are_done_and_few_are_close():
  held_out = editing.make_edits(128, 'combination', 0, 16)
  noise = np.random.default_rng(0).integers(0, 256, held_out.source.shape, np.uint8)
  result = editing.measure(noise, held_out, _embed)
  assert 0.3 < result.done.mean() < 0.7 and result.close.mean() < 0.05


def test_changes_outside_the_mask_affect_only_the_error_outside(held_out):
  result_image = np.where(held_out.mask[..., None], held_out.target, held_out.target ^ 10)
  result = editing.measure(result_image, held_out, _embed)
  assert result.done.all() and result.error_inside == 0 and result.error_outside > 0
  result_image = np.where(held_out.mask[..., None], held_out.target, 255 - held_out.target)
  assert editing.measure(result_image, held_out, _embed).close.all()
  half = np.where(held_out.mask[..., None], held_out.source, held_out.target)
  half[:8] = held_out.target[:8]
  assert editing.measure(half, held_out, _embed).done.tolist() == [True] * 8 + [False] * 8


def test_the_table_has_shares_by_kind():
  done, kinds = np.array([True, True, False, False]), np.array(['add', 'add', 'add', 'move'])
  result = editing.Result(done, done, done, 1.0, 1.0)
  line = editing.table('concept', {editing.COPY: result, 'generated': result}, kinds)[-1]
  assert line.endswith('done, by kind (generated): add 67% of 3, move 0% of 1')


def test_the_report_has_controls_and_images_from_drafts(monkeypatch, fake_subject):
  monkeypatch.setattr(EvaluatorNetwork, 'load', lambda source: _Network())
  edit = lambda source: fake_subject(
    lambda prompts: source, image_size=32, from_drafts=lambda prompts, images: images
  )
  refuse = lambda prompts: pytest.fail('sampled without a source image')
  subject = fake_subject(
    refuse, image_size=32, task='edits', editing=edit, from_drafts=lambda *_: None
  )
  report = BENCHMARK.run(subject)
  results = report.protocol['results']['combination']
  done = {name: row['done']['share'] for name, row in results['rows'].items()}
  sampled = ['generated', editing.OTHERS, FROM_DRAFTS]
  assert list(done) == [editing.COPY, editing.NOISE, *sampled]
  assert done[editing.COPY] == done['generated'] == 0 and done[FROM_DRAFTS] == 1
  assert report.numbers['edits/combination/done'] == 0
  assert results['rows']['generated']['psnr_outside'] is None
  assert results['rows'][editing.OTHERS]['error_outside'] > 0
  assert len(report.lines) == 8 and ' inf ' in report.lines[2] and '0% / 100% of' in report.lines[7]
  labels = [row.label for row in report.sheets['combination']]
  assert labels == ['source', 'target', 'generated', FROM_DRAFTS]
  assert report.sheets['combination'][0].captions[0] == results['edits'][0]['instruction']
  json.dumps(report.protocol, allow_nan=False)


def test_too_many_instructions_are_an_error(monkeypatch):
  monkeypatch.setattr(editing, '_POOL', 0)
  with pytest.raises(UserError, match='captions is 300.* 256 records'):
    editing.make_edits(300, 'combination', 0, 8)
