"""Runs on images in folders of classes, and their forks, in one process."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from configs import c2i_continuous as config_file
from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import to_dict
from vpe_jax.contracts import UserError
from vpe_jax.generator import Generator
from vpe_jax.training import loop, metrics, runs

pytestmark = pytest.mark.slow
SHARED, BRANCH = 3, 2


def _shrunk(folder, config, steps, **changes):
  """A config for 32 x 32 images in two class folders, as nested dicts."""
  config.steps = (steps,)
  config.data.update(source=f'folder:{folder / "data"}', examples=0, tokenizer='classes:red,blue')
  config.data.image_size, config.model.latent_size = 32, 8
  config.model.classes, config.model.body.layers = 2, 1
  config.optim.warmup = 0
  config.log.every, config.evals = 1, {'heldout': {'every': 0}, 'sample_grid': {'every': 0}}
  config.update(changes)
  return to_dict(systems.build(config.to_dict()).config)


def _train(folder, name, arg, steps, **changes):
  config = _shrunk(folder, config_file.get_config(arg), steps, **changes)
  assert runs.run(config, str(folder / name))


def _state(workdir):
  """All leaves of a run's newest checkpoint."""
  return weights.read_run(str(workdir), ('',))[0]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with images, and the runs of a fork in `fork`, which was interrupted once."""
  folder = tmp_path_factory.mktemp('fork')
  for name in ('red', 'blue'):
    (folder / 'data' / name).mkdir(parents=True)
    for side in range(8):
      image = Image.new('RGB', (40, 40), 'white')
      image.paste(name, (0, 0, 8 + 4 * side, 20))
      image.save(folder / 'data' / name / f'{side}.png')
  configs = config_file.get_config('debug,fork=both')['runs']
  evals = {'heldout': {'every': 0}, 'sample_grid': {'every': 1}}
  chain = {
    'shared': _shrunk(folder, configs['shared'], SHARED),
    'baseline': _shrunk(folder, configs['baseline'], BRANCH),
    'vpe': _shrunk(folder, configs['vpe'], 1, evals=evals),
  }
  train, started = loop.train, []

  def interrupted(config, system, workdir, *rest):
    started.append(workdir.rpartition('/')[2])
    return None if len(started) == 2 else train(config, system, workdir, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'train', interrupted)
    assert not runs.run_chain(chain, str(folder / 'fork'))
    assert runs.run_chain(chain, str(folder / 'fork'))
  assert started == ['shared', 'baseline', 'baseline', 'vpe']
  with pytest.raises(UserError, match='seed was 0, now 5'):  # also of a run that is complete
    runs.run_chain(chain | {'shared': chain['shared'] | {'seed': 5}}, str(folder / 'fork'))
  return folder / 'fork'


def _assert_equal(ours, theirs):
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_a_branch_without_visual_prompt_equals_the_continued_run(folder):
  _train(folder.parent, 'fork/long', 'debug,vpe=false', SHARED + BRANCH)
  branch, long = _state(folder / 'baseline'), _state(folder / 'long')
  assert (int(branch.pop('step')), int(long.pop('step'))) == (BRANCH, SHARED + BRANCH)
  assert (int(branch.pop('stage_step')), int(long.pop('stage_step'))) == (BRANCH, SHARED + BRANCH)
  _assert_equal(branch, long)


def test_a_branch_with_visual_prompt_inherits_all_but_the_code_embeddings(folder):
  state = _state(folder / 'vpe')
  assert int(state['opt_state/count']) == SHARED + 1
  assert {'params/embed/prefix', 'ema/embed/prefix'} <= state.keys()
  record = metrics.read(folder / 'vpe')[0]
  assert {'loss/flow', 'loss/next_token'} <= set(record)
  assert abs(record['loss/next_token'] - np.log(512)) < 0.5  # Fresh embeddings predict uniformly.
  select = lambda leaves: {path: leaf for path, leaf in leaves.items() if path[:7] == 'params/'}
  before, after = select(_state(folder / 'shared')), select(state)
  assert set(after) - set(before) == {'params/embed/prefix'}
  for path, leaf in before.items():  # One small step from the shared run.
    np.testing.assert_allclose(after[path], leaf, atol=3e-3)
  images = Generator.load(str(folder / 'vpe'))(['red', 'blue'], n=1, seed=1)
  assert images[0].image.shape == (32, 32, 3) and images[0].encoded['visual_prompt'].shape == (36,)


def test_forks_of_runs_that_do_not_fit_are_refused(folder):
  with pytest.raises(UserError, match="other parameters than this config: 'embed/prefix' is"):
    # A run without visual prompt can't continue one with it.
    _train(folder.parent, 'back', f'debug,vpe=false,fork={folder / "vpe"}', 1)
  with pytest.raises(UserError, match='ema/embed/classes.* is absent there'):
    _train(folder.parent, 'off', 'debug,vpe=false', 1, optim={'ema': 0.0, 'warmup': 0})
    _train(folder.parent, 'on', f'debug,vpe=false,fork={folder.parent / "off"}', 1)
