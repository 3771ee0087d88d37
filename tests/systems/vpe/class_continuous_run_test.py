"""Runs on images in folders of classes, and their forks, in one process."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from configs import c2i_continuous as config_file
from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.generator import Generator
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import loop, metrics

pytestmark = pytest.mark.slow
SHARED, BRANCH = 3, 2


def _train(folder, name, arg, steps, **changes):
  config = config_file.get_config(arg)
  config.steps = (steps,)
  config.data.update(source=f'folder:{folder / "data"}', examples=0, tokenizer='classes:red,blue')
  config.data.image_size, config.model.latent_size = 32, 8
  config.model.classes, config.model.body.layers = 2, 1
  config.optim.warmup = 0
  config.log.every, config.evals = 1, {'heldout': {'every': 0}, 'sample_grid': {'every': 0}}
  config.update(changes)
  system = systems.build(config.to_dict())
  return loop.train(system.config, system, str(folder / name))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with images, and the run that both branches share."""
  folder = tmp_path_factory.mktemp('fork')
  for name in ('red', 'blue'):
    (folder / 'data' / name).mkdir(parents=True)
    for side in range(8):
      image = Image.new('RGB', (40, 40), 'white')
      image.paste(name, (0, 0, 8 + 4 * side, 20))
      image.save(folder / 'data' / name / f'{side}.png')
  _train(folder, 'shared', 'debug,vpe=false', SHARED)
  return folder


def _assert_equal(ours, theirs):
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_a_branch_without_visual_prompt_equals_the_continued_run(folder):
  long = _train(folder, 'long', 'debug,vpe=false', SHARED + BRANCH)
  fork = f'debug,vpe=false,fork={folder / "shared"}'
  branch = _train(folder, 'baseline', fork, BRANCH)
  for tree in ('params', 'ema', 'opt_state'):
    _assert_equal(leaves_by_path(branch[tree]), leaves_by_path(long[tree]))
  assert int(branch['step']) == BRANCH and int(long['step']) == SHARED + BRANCH
  assert int(branch['examples_seen']) == int(long['examples_seen'])


@pytest.fixture(scope='module')
def branch(folder):
  """The final state of a branch with visual prompt, the run `vpe`."""
  fork = f'debug,vpe=true,fork={folder / "shared"}'
  evals = {'heldout': {'every': 0}, 'sample_grid': {'every': 1}}
  return _train(folder, 'vpe', fork, 1, evals=evals)


def test_a_branch_with_visual_prompt_inherits_all_but_the_code_embeddings(folder, branch):
  state = branch
  assert int(state['opt_state']['count']) == SHARED + 1
  assert 'prefix' in state['params']['embed'] and 'prefix' in state['ema']['embed']
  record = metrics.read(folder / 'vpe')[0]
  assert {'loss/flow', 'loss/next_token'} <= set(record)
  assert abs(record['loss/next_token'] - np.log(512)) < 0.5  # Fresh embeddings predict uniformly.
  before, _ = weights.load_run(str(folder / 'shared'), 'raw')
  before, after = leaves_by_path(before), leaves_by_path(state['params'])
  assert set(after) - set(before) == {'embed/prefix'}
  for path, leaf in before.items():  # One small step from the shared run.
    np.testing.assert_allclose(after[path], leaf, atol=3e-3)
  images = Generator.load(str(folder / 'vpe'))(['red', 'blue'], n=1, seed=1)
  assert images[0].image.shape == (32, 32, 3) and images[0].encoded['visual_prompt'].shape == (36,)


@pytest.mark.usefixtures('branch')
def test_forks_of_runs_that_do_not_fit_are_refused(folder):
  with pytest.raises(UserError, match="other parameters than this config: 'embed/prefix' is"):
    # A run without visual prompt can't continue one with it.
    _train(folder, 'back', f'debug,vpe=false,fork={folder / "vpe"}', 1)
  with pytest.raises(UserError, match='ema/embed/classes.* is absent there'):
    _train(folder, 'off', 'debug,vpe=false', 1, optim={'ema': 0.0, 'warmup': 0})
    _train(folder, 'on', f'debug,vpe=false,fork={folder / "off"}', 1)
