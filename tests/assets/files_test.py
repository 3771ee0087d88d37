"""Files in vpe_jax/assets: their total size, and the configs that made them."""

import json
import pathlib

import pytest

from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import differences
from vpe_jax.training import config_file, resume

ASSETS = pathlib.Path(weights.__file__).parents[1] / 'assets'
SHIPPED = ('siglip', 'evaluator_network', 'feature_vq', 'image', 'image_codes', 'tiny')
# Fields that may differ from the config file, as its header says or because they belong to another
# stage.
ALLOWED_DIFFERENCES = {
  'evaluator_network': ('steps', 'optim.lr'),
  'tiny': ('steps', 'data.examples'),
  'image': ('model.usage', 'model.feature_vq.temperature'),
}


def test_assets_fit_the_size_budget_and_have_configs():
  files = {path.stem: path.stat().st_size for path in ASSETS.glob('*.safetensors')}
  assert set(SHIPPED) <= set(files) <= set(weights.ASSET_CONFIGS)
  assert sum(files.values()) <= 24e6


@pytest.mark.parametrize('name', SHIPPED)
def test_asset_was_made_by_its_config(name):
  metadata = weights.load(f'assets:{name}')[1]
  config = systems.build(config_file.load(weights.ASSET_CONFIGS[name], {})).config
  differing = differences(config, json.loads(metadata['config']))
  free = (*resume.FREE, *ALLOWED_DIFFERENCES.get(name, ()))
  assert not [field for field in differing if not field.startswith(free)]
  assert set(ALLOWED_DIFFERENCES.get(name, ())) <= set(differing)
  assert len(metadata['commit']) == 40 and metadata['weights'] == 'ema'
