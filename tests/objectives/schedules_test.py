"""The progressive schedule at the paper's points."""

from __future__ import annotations

import numpy as np

from vpe_jax.objectives import schedules


def test_sigmoid_schedule_at_the_papers_points():
  """reference: Eq. 2 and 3 at s/S = 0, 1/4, 1/2, 3/4, 1, and beyond."""
  steps = (0, 25, 50, 75, 100, 200)
  weight = [float(schedules.sigmoid_schedule(s, 100, 0.03, 0.1)) for s in steps]
  expected = [0.03047, 0.03531, 0.065, 0.09469, 0.09953, 0.09953]
  np.testing.assert_allclose(weight, expected, atol=5e-6)
  mask = [float(schedules.sigmoid_schedule(s, 100, 0.95, 0.05)) for s in steps[:5]]
  np.testing.assert_allclose(mask, [0.9440, 0.8817, 0.5, 0.1183, 0.0560], atol=5e-5)


def test_all_kinds_of_schedules_at_the_paper_s_values():
  """The paper's two uses: 0.95 to 0.05 of Eq. 2, where 0 is off, and 0.03 to 0.1 of Eq. 3."""
  steps = (0, 25, 50, 100, 200)
  value = lambda kind, start, end, off: [
    float(schedules.Schedule(kind, 100, start, end, off).at(s)) for s in steps
  ]
  np.testing.assert_allclose(
    value('linear', 0.95, 0.05, 0.0), [0.95, 0.725, 0.5, 0.05, 0.05], atol=1e-6
  )
  np.testing.assert_allclose(value('constant', 0.95, 0.05, 0.0), [0.95] * 5)
  assert value('off', 0.95, 0.05, 0.0) == [0.0] * 5 and value('off', 0.03, 0.1, 1.0) == [1.0] * 5
  expected = [float(schedules.sigmoid_schedule(s, 100, 0.03, 0.1)) for s in steps]
  np.testing.assert_allclose(value('sigmoid', 0.03, 0.1, 1.0), expected)
  texts = [str(schedules.Schedule(kind, 100, 0.03, 0.1, off=1.0)) for kind in schedules.KINDS]
  assert texts == ['0.03 to 0.1 (sigmoid)', '0.03 to 0.1 (linear)', '0.03', '1']
  assert schedules.KINDS == ('sigmoid', 'linear', 'constant', 'off')
