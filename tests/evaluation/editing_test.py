"""The benchmark of edits: metrics, controls and the report."""

import json

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.evaluation import editing
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import FROM_DRAFTS

MOST = pytest.approx(58.92, abs=0.01)  # the PSNR of identical images
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
  assert [*done.psnr_inside, *done.psnr_outside] == [MOST] * 32
  assert not copied.done.any() and not copied.close.any() and not copied.resembles_target.any()
  assert [*copied.psnr_outside] == [MOST] * 16
  summary = json.loads(json.dumps(done.summary(held_out.kinds)))
  assert summary['done']['value'] == 1 and summary['psnr_outside']['value'] == MOST
  assert sum(kind['done']['value'] * kind['edits'] for kind in summary['kinds'].values()) == 16


def test_psnr_is_the_mean_over_images_of_each_images_psnr(held_out):
  rng = np.random.default_rng(0)
  result_images = rng.integers(0, 256, held_out.source.shape, np.uint8)
  result = editing.measure(result_images, held_out, _embed)
  inside, outside, everywhere = [], [], []
  for image, source, target, mask in zip(
    result_images / 255, held_out.source / 255, held_out.target / 255, held_out.mask
  ):
    db = lambda error: -10 * np.log10(error.mean())
    inside.append(db(np.square(image - target)[mask]))
    outside.append(db(np.square(image - source)[~mask]))
    # PIE-Bench sets pixels inside the mask to zero in both images.
    everywhere.append(db(np.square((image - source) * ~mask[..., None])))
  value = {name: figure.value for name, figure in result.figures.items()}
  assert value['psnr_inside'] == pytest.approx(np.mean(inside), abs=1e-4)
  assert value['psnr_outside'] == pytest.approx(np.mean(outside), abs=1e-4)
  assert value['psnr_outside_pie'] == pytest.approx(np.mean(everywhere), abs=1e-4)
  low, high = result.figures['psnr_outside'].interval
  assert low < value['psnr_outside'] < high


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
  assert result.done.all() and [*result.psnr_inside] == [MOST] * 16
  assert result.psnr_outside.max() < 58
  result_image = np.where(held_out.mask[..., None], held_out.target, 255 - held_out.target)
  assert editing.measure(result_image, held_out, _embed).close.all()
  half = np.where(held_out.mask[..., None], held_out.source, held_out.target)
  half[:8] = held_out.target[:8]
  assert editing.measure(half, held_out, _embed).done.tolist() == [True] * 8 + [False] * 8


def test_the_table_has_shares_by_kind():
  done, kinds = np.array([True, True, False, False]), np.array(['add', 'add', 'add', 'move'])
  result = editing.Result(done, done, done, *np.ones((3, 4)))
  line = editing.table('concept', {editing.COPY: result, 'generated': result}, kinds)[-1]
  assert line.endswith('done, by kind (generated): add 67% of 3, move 0% of 1')


def test_the_report_has_controls_and_images_from_drafts(monkeypatch, fake_subject):
  monkeypatch.setattr(EvaluatorNetwork, 'load', lambda source: _Network())
  # The model copies the source; the codec, and images from drafts, differ by some levels.
  edit = lambda source: fake_subject(
    lambda prompts: source, image_size=32, from_drafts=lambda prompts, images: images ^ 4
  )
  refuse = lambda prompts: pytest.fail('sampled without a source image')
  subject = fake_subject(
    refuse,
    image_size=32,
    task='edits',
    editing=edit,
    from_drafts=lambda *_: None,
    reconstruct=lambda images: images ^ 1,
  )
  report = BENCHMARK.run(subject)
  results = report.protocol['results']['combination']
  done = {name: row['done']['value'] for name, row in results['rows'].items()}
  coded = [editing.SOURCE_CODED, editing.TARGET_CODED]
  sampled = ['generated', editing.OTHERS, FROM_DRAFTS]
  assert list(done) == [editing.COPY, editing.NOISE, *coded, *sampled]
  assert done[editing.COPY] == done['generated'] == 0 and done[FROM_DRAFTS] == 1
  assert report.numbers['edits/combination/done'] == 0
  psnr = {name: row['psnr_outside']['value'] for name, row in results['rows'].items()}
  assert psnr['generated'] == psnr[editing.COPY] == MOST
  assert psnr[editing.SOURCE_CODED] == psnr[editing.TARGET_CODED] == pytest.approx(48.13, abs=0.01)
  assert psnr[FROM_DRAFTS] == pytest.approx(48.13 - 20 * np.log10(4), abs=0.01)
  assert psnr[editing.NOISE] < psnr[editing.OTHERS] < psnr[FROM_DRAFTS]
  assert report.numbers.get('edits/combination/psnr_outside') == MOST
  assert report.numbers.get('edits/combination/true_drafts/psnr_outside') == psnr[FROM_DRAFTS]
  planner = results['differences'][f'{FROM_DRAFTS} minus generated']['psnr_outside']
  # The same edits are paired, and each loses the same.
  assert planner['interval95'] == pytest.approx([psnr[FROM_DRAFTS] - psnr['generated']] * 2)
  assert len(report.lines) == 13 and '58.92' in report.lines[2]
  assert '0% / 100% of' in report.lines[-1]
  labels = [row.label for row in report.sheets['combination']]
  assert labels == ['source', 'target', 'generated', FROM_DRAFTS]
  assert report.sheets['combination'][0].captions[0] == results['edits'][0]['instruction']
  json.dumps(report.protocol, allow_nan=False)


def test_too_many_instructions_are_an_error(monkeypatch):
  monkeypatch.setattr(editing, '_POOL', 0)
  with pytest.raises(UserError, match='captions is 300.* 256 records'):
    editing.make_edits(300, 'combination', 0, 8)
