"""Tests of the plots of a run."""

import numpy as np
import pytest
from PIL import Image

from vpe_jax.training import curves, metrics


def test_smooth_is_a_trailing_mean():
  points = [(step, float(step)) for step in range(40)]
  smooth = curves.smooth(points)  # window of 5 % of 40 points: two
  assert smooth[0] == (0, 0.0) and smooth[10] == (10, 9.5) and len(smooth) == 40


@pytest.mark.parametrize(
  'low, high, expected',
  [
    (0, 10, [0, 2, 4, 6, 8, 10]),
    (0.12, 0.58, [0.2, 0.3, 0.4, 0.5]),
    (-3, 2, [-3, -2, -1, 0, 1, 2]),
  ],
)
def test_ticks_are_round_numbers_within_the_bounds(low, high, expected):
  np.testing.assert_allclose(curves.ticks(low, high), expected, atol=1e-12)


def test_panels_pair_training_with_held_out():
  records = [
    {'step': 1, 'loss/flow': 2.0, 'grad_norm': 1.0},
    {'step': 2, 'loss/flow': None, 'grad_norm': 1.0, 'eval/flow': 2.5},
    {'step': 3, 'sample/own/latent_distance': 1.0, 'sample/true_drafts/latent_distance': 0.5},
  ]
  panels = {panel.title: panel for panel in curves.make_panels(records)}
  assert panels.keys() == {'loss/flow', 'grad_norm', 'sample/own/latent_distance'}
  assert panels['loss/flow'].training == [(1, 2.0)]
  assert panels['loss/flow'].held_out == [(2, 2.5)]
  assert panels['sample/own/latent_distance'].held_out == [(3, 0.5)]


def test_held_out_metric_without_training_values_has_a_panel():
  records = [{'step': s, 'loss/next_token': 2.0, 'eval/next_token': 2.0, 'eval/flow': s / 10}
             for s in (1, 2)]  # fmt: skip
  panels = {panel.title: panel for panel in curves.make_panels(records)}
  assert list(panels) == ['loss/next_token', 'eval/flow']
  assert panels['eval/flow'].training == [(1, 0.1), (2, 0.2)]


def test_a_term_that_is_logged_only_is_not_called_a_loss():
  records = [{'step': s, 'stage': 'ab'[s > 2], 'loss/flow': 1.0, 'loss/accuracy': 0.5}
             for s in (1, 2, 3)]  # fmt: skip
  panels = curves.make_panels(records, {'accuracy'})
  assert [panel.title for panel in panels] == ['loss/flow', 'accuracy']
  assert panels[0].stages == ((1, 'a'), (3, 'b'))


def test_each_stage_is_marked_and_smoothed_by_itself():
  points = [(step, 0.0 if step < 200 else 1.0) for step in range(400)]
  stages = ((0, 'a'), (200, 'b'))
  assert curves.smooth(points, stages) == points
  image = lambda *stages: np.asarray(curves.render([curves.Panel('x', points, [], stages)]))
  dots = (image(*stages) == curves._MARK).all(-1)
  middle = (curves._MARGIN + curves._WIDTH - 14) // 2
  assert dots[:, middle - 2 : middle + 3].any(0).sum() == 1
  assert not (image(stages[0]) == curves._MARK).all(-1).any()


def test_the_last_tick_is_whole():
  wide = [(step, 1.0) for step in (0, 100_000)]
  image = np.asarray(curves.render([curves.Panel('x', wide, [])]))[:, : curves._WIDTH]
  below = (image[-24:] != curves._PAPER).any(-1)
  assert below[:, -40:].any() and not below[:, -1].any()


def test_falling_curve_falls_in_the_plot():
  falling = [(step, 5 - step / 100) for step in range(400)]
  image = np.asarray(curves.render([curves.Panel('loss/flow', falling, [])]))
  rows, columns = np.nonzero((image == curves._SMOOTH).all(-1))
  left, right = rows[columns < np.quantile(columns, 0.1)], rows[columns > np.quantile(columns, 0.9)]
  assert left.mean() + 100 < right.mean()


def test_write_saves_an_image_next_to_the_metrics(tmp_path):
  curves.write(tmp_path)
  assert not (tmp_path / curves.FILE).exists()
  file = metrics.MetricsFile(tmp_path, 0)
  for step in (1, 2, 3):
    file.write({'step': step, 'loss/a': 1.0, 'loss/b': float(step), 'grad_norm': 0.0})
  file.close()
  curves.write(tmp_path)
  with Image.open(tmp_path / curves.FILE) as image:
    assert image.size == (2 * 460, 2 * 260)
