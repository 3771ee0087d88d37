"""Files in vpe_jax/assets: together small, and each made by the config that it names."""

import json
import pathlib

import pytest

from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import differences
from vpe_jax.training import config_file, resume

ASSETS = pathlib.Path(weights.__file__).parents[1] / 'assets'
SHIPPED = ('siglip', 'judge', 'feature_vq', 'image', 'image_codes', 'tiny')
# What a file's config may have otherwise, as the config's header says, or for another stage.
OTHERWISE = {
  'judge': ('steps', 'optim.lr'),
  'tiny': ('steps', 'data.examples'),
  'image': ('model.usage', 'model.feature_vq.temperature'),
}


def test_they_fit_the_budget_and_none_is_unknown():
  files = {path.stem: path.stat().st_size for path in ASSETS.glob('*.safetensors')}
  assert set(SHIPPED) <= set(files) <= set(weights.ASSET_CONFIGS)
  assert sum(files.values()) <= 24e6


@pytest.mark.parametrize('name', SHIPPED)
def test_each_is_what_its_config_makes(name):
  metadata = weights.load(f'assets:{name}')[1]
  config = systems.build(config_file.load(weights.ASSET_CONFIGS[name], {})).config
  differing = differences(config, json.loads(metadata['config']))
  free = (*resume.FREE, *OTHERWISE.get(name, ()))
  assert not [field for field in differing if not field.startswith(free)]
  assert set(OTHERWISE.get(name, ())) <= set(differing)
  assert len(metadata['commit']) == 40 and metadata['weights'] == 'ema'
