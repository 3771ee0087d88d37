"""Tests of plots: axes, smoothing, curves and intervals."""

import numpy as np
import pytest

from vpe_jax.evaluation import plots
from vpe_jax.evaluation.plots import Curve, Panel


def test_smooth_is_a_trailing_mean():
  points = [(step, float(step)) for step in range(40)]
  smooth = plots.smooth(points)  # window of 5 % of 40 points: two
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
  np.testing.assert_allclose(plots.ticks(low, high), expected, atol=1e-12)


def test_falling_curve_falls_in_the_plot():
  falling = [(step, 5 - step / 100) for step in range(400)]
  image = np.asarray(plots.render([Panel('loss/flow', (Curve(falling, smoothed=True),))]))
  rows, columns = np.nonzero((image == plots.COLOURS[0]).all(-1))
  left, right = rows[columns < np.quantile(columns, 0.1)], rows[columns > np.quantile(columns, 0.9)]
  assert left.mean() + 100 < right.mean()


def _pixels(image, colour):
  """Rows and columns of the pixels of a colour."""
  return np.nonzero((image == colour).all(-1))


def test_curves_of_several_runs_have_colours_and_a_legend():
  flat = lambda value, label: Curve([(0, value), (10, value)], label)
  panels = [Panel('accuracy', (flat(0.2, 'runs/a'), flat(0.8, 'runs/b')))]
  image = np.asarray(plots.render(panels))
  first, second = (_pixels(image, colour)[0] for colour in plots.COLOURS[:2])
  assert np.median(first) > np.median(second) + 80
  # The labels are in the plot, right above.
  assert all((_pixels(image, colour)[0] < 65).sum() > 20 for colour in plots.COLOURS[:2])


def test_an_interval_is_an_area_between_its_bounds():
  band = ((0, 0.0, 1.0), (10, 0.4, 0.6))
  image = np.asarray(plots.render([Panel('a', (Curve([(0, 0.5), (10, 0.5)], band=band),))]))
  white = [255, 255, 255]
  tinted = lambda column: (image[30:228, column] != white).any(-1).mean()
  # Wide on the left, narrow on the right; grid lines cross both.
  assert tinted(70) > 0.7 and tinted(430) < 0.4


def test_each_stage_is_marked_and_smoothed_by_itself():
  points = [(step, 0.0 if step < 200 else 1.0) for step in range(400)]
  stages = ((0, 'a'), (200, 'b'))
  assert plots.smooth(points, stages) == points
  curve = Curve(points, smoothed=True)
  image = lambda *stages: np.asarray(plots.render([Panel('x', (curve,), stages)]))
  dots = (image(*stages) == plots.MARK).all(-1)
  middle = (plots._MARGIN + plots._WIDTH - 14) // 2
  assert dots[:, middle - 2 : middle + 3].any(0).sum() == 1
  assert not (image(stages[0]) == plots.MARK).all(-1).any()


def test_the_last_tick_is_whole():
  image = np.asarray(plots.render([Panel('x', (Curve([(0, 1.0), (100_000, 1.0)]),))]))
  below = (image[-24:, :460] != [255, 255, 255]).any(-1)
  assert below[:, -40:].any() and not below[:, -1].any()
