"""A paper-size training step, compiled for a TPU pod that isn't here."""

from __future__ import annotations

import pytest

from configs import t2i
from vpe_jax.compilation import examine
from vpe_jax.compilation.examine import Request


@pytest.mark.slow
def test_a_paper_step_fits_its_pod():
  """Stage `plan` of the whole model."""
  config = t2i.get_config('paper')
  config.data.encode = 'cached'
  found = examine.examine(config.to_dict(), Request('v5p:4x4x4', stage='plan')).as_dict()
  assert round(found['parameters'] / 1e6, 1) == 4166.3
  assert (found['chips'], found['images_per_step']) == (64, 480)
  assert found['fits'] and found['hbm_fraction'] < 0.9
  assert 1.0 < found['hlo_flops_per_step'] / found['model_flops_per_step'] < 2.0
  assert found['bound_by'] in ('compute', 'hbm', 'ici') and found['mfu_bound'] > 0.4
