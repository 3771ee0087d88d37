"""A run of External+VPE with cross-attention, from stage plan to images, in one process."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from configs import t2i as config_file
from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.generator import Generator
from vpe_jax.training import loop, metrics

pytestmark = pytest.mark.slow


def test_cross_attention_trains_resumes_and_samples(tmp_path):
  config = config_file.get_config('debug,arch=external')
  config.model.condition = 'cross'
  config.steps = (1, 2)
  config.data.examples = 16
  for part in ('ar', 'dit', 'head'):
    config.model[part].layers = 1
  config.model.dual_path.encoder.layers = 1
  config.optim = {'lr': (1e-3, 1e-2), 'warmup': 0}
  config.log.every, config.evals = 1, {'heldout': {'every': 0}, 'sample_grid': {'every': 0}}
  config.sample.steps = 2
  system = systems.build(config.to_dict())
  run = str(tmp_path / 'run')
  loop.train(system.config, system, run, ())
  # The output of cross-attention starts at 0, and so do the gradients behind it.
  first, _ = weights.load_run(run, 'raw')
  assert np.any(first['dit']['layers']['cross']['o']['kernel'])
  config.steps = (1, 3)
  longer = systems.build(config.to_dict())
  loop.train(longer.config, longer, run, ('steps',))
  assert [record['stage'] for record in metrics.read(run)] == ['plan'] + 3 * ['render']
  params, _ = weights.load_run(run, 'raw')
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, first)
  assert all(jax.tree.leaves(moved['dit']['layers']['cross']))
  assert not any(jax.tree.leaves([moved['ar'], moved['embed']]))
  generator = Generator.load(run)
  circle, pears = generator(['a red circle', 'two green pears'])
  codes = circle.encoded['visual_prompt']
  assert circle.image.shape == (64, 64, 3) and (codes != pears.encoded['visual_prompt']).any()
  dog = generator('a dog', fixed={'visual_prompt': codes})[0]
  np.testing.assert_array_equal(dog.encoded['visual_prompt'], codes)
