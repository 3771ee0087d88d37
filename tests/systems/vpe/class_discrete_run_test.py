"""A run on images in folders of classes, from training to samples, in one process."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import c2i_discrete as config_file
from vpe_jax import export, systems
from vpe_jax.contracts import UserError
from vpe_jax.generator import Generator
from vpe_jax.training import loop, metrics

pytestmark = pytest.mark.slow
STEPS = 2


def _train(folder, steps=STEPS, samples=STEPS, allow=()):
  config = config_file.get_config('debug')
  config.steps = (steps,)
  config.data.update(source=f'folder:{folder / "data"}', examples=0, tokenizer='classes:red,blue')
  config.data.image_size = 32  # 64 codes, not 256
  config.model.classes, config.model.body.layers = 2, 1
  config.log.every = 1
  config.evals = {'heldout': {'every': 0}, 'sample_grid': {'every': samples}}
  system = systems.build(config.to_dict())
  return loop.train(system.config, system, str(folder / 'run'), allow)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('c2i')
  for name in ('red', 'blue'):
    (folder / 'data' / name).mkdir(parents=True)
    for side in range(8):
      image = Image.new('RGB', (40, 40), 'white')
      image.paste(name, (0, 0, 8 + 4 * side, 20))
      image.save(folder / 'data' / name / f'{side}.png')
  _train(folder)
  return folder


@pytest.fixture(scope='module')
def run(folder):
  return folder / 'run'


@pytest.fixture(scope='module')
def generator(run):
  return Generator.load(str(run))


def test_a_run_logs_samples_and_resumes(folder, run):
  records = metrics.read(run)
  assert [record['step'] for record in records] == list(range(1, STEPS + 1))
  assert {'loss/plan', 'loss/image', 'loss/masked', 'loss/next_token'} <= set(records[0])
  assert 0 <= records[-1]['sample/own/equal_codes'] <= 1
  assert (run / 'samples' / f'step_{STEPS:07d}.png').exists()
  state = _train(folder, STEPS + 1, 0, ('steps',))
  assert int(state['step']) == STEPS + 1
  assert [r['step'] for r in metrics.read(run)] == list(range(1, STEPS + 2))


def test_classes_are_sampled_and_unknown_ones_are_refused(generator):
  images = generator(['red', 'blue'], n=2, seed=1)
  assert len(images) == 4 and images[0].image.shape == (32, 32, 3)
  first, second = (image.encoded['visual_prompt'] for image in images[:2])
  assert first.shape == (36,) and (first != second).any()
  again = generator('red', n=2, seed=1, fixed={'visual_prompt': first})
  np.testing.assert_array_equal(again[0].image, images[0].image)
  with pytest.raises(UserError, match="no class 'bleu'; did you mean 'blue'"):
    generator('bleu')


def test_images_pass_through_the_codec_alone(generator, folder):
  true = [np.asarray(Image.open(path)) for path in sorted((folder / 'data' / 'red').iterdir())]
  coded = generator.reconstruct(true)
  assert coded.shape == (8, 32, 32, 3) and coded.dtype == np.uint8
  squares = np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in true])
  assert np.abs(coded.astype(float) - squares).mean() < 25


def test_exported_weights_load_with_the_same_shapes(run, generator, tmp_path):
  to = str(tmp_path / 'c2i.safetensors')
  metadata = export.export(str(run), to)
  assert json.loads(metadata['config'])['system'] == 'c2i_discrete'
  loaded = Generator.load(to)
  shapes = lambda g: jax.tree.map(np.shape, g.params)
  assert shapes(loaded) == shapes(generator)
  assert loaded('red')[0].image.shape == (32, 32, 3)
