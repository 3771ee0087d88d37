"""Test of a paper-size training step, compiled for a TPU pod."""

from __future__ import annotations

import pytest

from configs import t2i
from vpe_jax.compilation import examine
from vpe_jax.compilation.examine import Request


@pytest.mark.slow
def test_paper_step_of_stage_plan_fits_its_pod():
  config = t2i.get_config('paper')
  config.data.encode = 'cached'
  report = examine.examine(config.to_dict(), Request('v5p:4x4x4', stage='plan')).as_dict()
  assert round(report['parameters'] / 1e6, 1) == 4166.3
  assert (report['chips'], report['images_per_step']) == (64, 480)
  assert report['fits'] and report['hbm_fraction'] < 0.9
  assert 1.0 < report['hlo_flops_per_step'] / report['model_flops_per_step'] < 2.0
  assert report['bound_by'] in ('compute', 'hbm', 'ici') and report['mfu_bound'] > 0.4
