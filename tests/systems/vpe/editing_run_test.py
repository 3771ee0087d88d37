"""A text-to-image run, an edit stage that continues it, and edited images, in one process."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from configs import edit, t2i
from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.generator import Generator
from vpe_jax.training import loop, metrics

pytestmark = pytest.mark.slow


def _train(config, workdir, samples, evaluate=0):
  for part in ('ar', 'dit', 'head'):
    config.model[part].layers = 1
  config.model.dual_path.encoder.layers = 1
  config.data.examples = 16
  config.log.every = 1
  config.evals = {'heldout': {'every': evaluate}, 'sample_grid': {'every': samples}}
  config.sample.steps = 2
  system = systems.build(config.to_dict())
  loop.train(system.config, system, str(workdir), ())


def _continue_with_editing(folder, arch, samples=0, evaluate=0):
  """Trains the runs `t2i` and `edits` in a folder.

  Returns the parameters of both, the last record of metrics of `edits`, and its generator.
  """
  config = t2i.get_config(f'debug,arch={arch}')
  # A stage that may run alone.
  config.stages = ('joint',) if arch == 'internal' else ('plan',)
  config.steps, config.batch_size = (1,), (8,)
  _train(config, folder / 't2i', 0)
  config = edit.get_config(f'debug,arch={arch}')
  config.start, config.steps = str(folder / 't2i'), (2,)
  _train(config, folder / 'edits', samples, evaluate)
  before, _ = weights.load_run(config.start, 'ema')
  after, _ = weights.load_run(str(folder / 'edits'), 'raw')
  assert_close = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3)
  jax.tree.map(assert_close, after['ar']['dual_path'], before['dit']['dual_path'])
  last = metrics.read(str(folder / 'edits'))[-1]
  return before, after, last, Generator.load(str(folder / 'edits'))


def test_a_text_to_image_run_continues_with_editing(tmp_path):
  *_, last, generator = _continue_with_editing(tmp_path, 'internal', samples=2, evaluate=2)
  assert list((tmp_path / 'edits' / 'samples').glob('step_*.png'))
  assert last['eval/flow'] > 0 and last['eval/next_token'] > 0 and 'loss/flow' in last

  with pytest.raises(UserError, match='name a source image'):
    generator('make it red')
  white, black = (np.full((40, 60, 3), shade, np.uint8) for shade in (255, 0))
  from_white, from_black = (generator.editing(image)('make it red')[0] for image in (white, black))
  reordered = generator.editing(white)(['make it blue', 'make it red'])[1]
  np.testing.assert_array_equal(reordered.image, from_white.image)
  assert (from_white.image != from_black.image).any()
  assert from_white.metadata['source_image'] != from_black.metadata['source_image']
  edit_both = generator.editing(np.stack([white, black]))
  np.testing.assert_array_equal(
    edit_both(['make it red', 'make it blue'])[0].image, from_white.image
  )
  np.testing.assert_array_equal(
    edit_both(['make it blue', 'make it red'])[1].image, from_black.image
  )
  with pytest.raises(UserError, match='2 images to edit and 3 to generate'):
    edit_both('make it red', n=3)
  with pytest.raises(UserError, match=r'has shape \(40, 60\): \[H, W, 3\] is needed'):
    generator.editing(white[..., 0])
  with pytest.raises(UserError, match='dtype float32: uint8'):
    generator.editing(white.astype(np.float32))
  text_to_image = Generator.load(str(tmp_path / 't2i'))
  with pytest.raises(UserError, match='generates images from prompts only'):
    text_to_image.editing(white)


def test_an_external_run_continues_with_its_diffusion_expert_frozen(tmp_path):
  before, after, last, generator = _continue_with_editing(tmp_path, 'external')
  jax.tree.map(np.testing.assert_array_equal, after['dit'], before['dit'])
  changed = (after['embed']['text'] != before['embed']['text']).any(1)
  assert changed.any() and not changed[generator.system.config.model.boi]
  assert 'loss/next_token' in last and 'loss/flow' not in last
  white, black = (np.full((64, 64, 3), shade, np.uint8) for shade in (255, 0))
  from_white, from_black = generator.editing(np.stack([white, black]))('make it red', n=2)
  assert (from_white.image != from_black.image).any()
