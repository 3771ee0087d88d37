"""The progressive schedule at the paper's points."""

from __future__ import annotations

import numpy as np

from vpe_jax.objectives import schedules


def test_sigmoid_schedule_at_the_papers_points():
  """reference: Eq. 2 and 3 at s/S = 0, 1/4, 1/2, 3/4, 1, and beyond."""
  steps = (0, 25, 50, 75, 100, 200)
  weight = [float(schedules.sigmoid_schedule(s, 100, 0.03, 0.1)) for s in steps]
  wanted = [0.03047, 0.03531, 0.065, 0.09469, 0.09953, 0.09953]
  np.testing.assert_allclose(weight, wanted, atol=5e-6)
  mask = [float(schedules.sigmoid_schedule(s, 100, 0.95, 0.05)) for s in steps[:5]]
  np.testing.assert_allclose(mask, [0.9440, 0.8817, 0.5, 0.1183, 0.0560], atol=5e-5)
