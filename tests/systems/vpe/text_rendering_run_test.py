"""A run on images of words without visual prompt, from training to samples, in one process."""

from __future__ import annotations

import pytest

from configs import text_rendering as config_file
from vpe_jax import systems
from vpe_jax.contracts import UserError
from vpe_jax.generator import Generator
from vpe_jax.training import loop, metrics

pytestmark = pytest.mark.slow
STEPS = 2


def test_a_run_logs_evaluates_and_samples(tmp_path, capsys):
  config = config_file.get_config('debug,vpe=false')
  config.steps = (STEPS,)
  config.data.examples = 16
  for part in ('ar', 'dit', 'head'):
    config.model[part].layers = 1
  config.model.dual_path.encoder.layers = 1
  config.log.every = 1
  config.evals = {'heldout': {'every': STEPS}, 'sample_grid': {'every': 0}}
  config.sample.steps = 2
  system = systems.build(config.to_dict())
  run = str(tmp_path / 'run')
  loop.train(system.config, system, run, ())
  first, last = metrics.read(run)
  assert {name for name in first if name.startswith('loss/')} == {'loss/flow'}
  assert last['eval/flow'] > 0 and 'eval/next_token' not in last
  assert f'heldout: eval/flow {last["eval/flow"]:.4g}\n' in capsys.readouterr().out
  generator = Generator.load(run)
  first, second = generator('the word "fox" in a red serif font', n=2)
  assert first.image.shape == (64, 64, 3) and 'visual_prompt' not in first.encoded
  assert (first.image != second.image).any()
  with pytest.raises(UserError, match="drafts no 'visual_prompt'"):
    generator('the word "fox"', fixed={'visual_prompt': [1, 2, 3]})
