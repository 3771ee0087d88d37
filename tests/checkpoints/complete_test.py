"""Complete folders: a generator that is opened without its run, its assets and its tokenizer."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from configs import t2i
from tests.small_systems import redrawn
from vpe_jax import systems
from vpe_jax.checkpoints import imports, weights
from vpe_jax.checkpoints.exports import export_folder
from vpe_jax.config import to_dict
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.generator import Generator

PROMPT = 'a red fox'


@pytest.fixture(scope='module')
def config():
  config = t2i.get_config('debug')
  for part in (config.model.ar, config.model.dit, config.model.head):
    part.layers = 1
  return to_dict(systems.build(config.to_dict()).config)


@pytest.fixture(scope='module')
def exported(config, tmp_path_factory):
  """A folder, moved after the export; and an image of the run, with codes of the image."""
  root = tmp_path_factory.mktemp('complete')
  params = jax.device_get(redrawn(systems.build(config).init(jax.random.key(0)), 0.05))
  params = weights.round_to(params)
  run = str(root / 'run')
  imports.write_checkpoint(run, params, config, stage=1, step=20)
  generator = Generator.load(run)
  (image,) = generator(PROMPT, settings=generator.settings(guidance=2.0))
  codes = generator.read_drafts([image.image])['visual_prompt']
  lines = export_folder(run, str(root / 'folder'), licence='CC-BY-4.0', guidance=2.0)
  assert '  tokenizer: from assets:bpe' in lines
  shutil.rmtree(run)
  shutil.move(root / 'folder', root / 'moved')
  return root / 'moved', image, codes


def test_a_folder_samples_and_encodes_without_anything_else(exported, tmp_path, monkeypatch):
  folder, image, codes = exported
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(weights, 'ASSET_CONFIGS', {})  # Every asset is unknown.
  monkeypatch.setattr(bpe, 'shipped', lambda: pytest.fail('the shipped tokenizer was read'))
  generator = Generator.load(str(folder))
  assert generator.settings().guidance == 2.0
  (ours,) = generator(PROMPT)
  np.testing.assert_array_equal(ours.image, image.image)
  np.testing.assert_array_equal(generator.read_drafts([ours.image])['visual_prompt'], codes)
  config = weights.read_config(str(folder))
  assert all(str(folder) in source for source in _sources(config))


def _sources(config):
  """Sources of the frozen networks, and of the tokenizer."""
  networks = systems.build(config).frozen
  assert set(networks) == {'siglip', 'feature_vq', 'image'}
  return [*(network.source for network in networks.values()), config['data']['tokenizer']]


def test_the_model_card_has_provenance_and_licence(exported):
  card = (exported[0] / 'README.md').read_text()
  for text in ('step 20', 'OpenMoji (CC BY-SA 4.0)', '| licence | CC-BY-4.0 |', 'assets:image'):
    assert text in card


def test_what_is_no_generator_or_exists_is_refused(exported, tmp_path):
  with pytest.raises(UserError, match='does not generate images'):
    export_folder('assets:siglip', str(tmp_path / 'out'))
  with pytest.raises(UserError, match='exists'):
    export_folder('assets:tiny', str(exported[0]))
  assert not list(tmp_path.iterdir())


def test_a_file_has_one_kind_of_weights_and_one_step(tmp_path):
  for options, message in (({'which': 'raw'}, 'EMA weights only'), ({'step': 5}, '--step=5')):
    with pytest.raises(UserError, match=message):
      export_folder('assets:tiny', str(tmp_path / 'out'), **options)
  assert not list(tmp_path.iterdir())


def test_a_bucket_is_refused_before_weights_are_read(monkeypatch):
  monkeypatch.setattr(weights, 'load', lambda *_: pytest.fail('weights were read'))
  with pytest.raises(UserError, match='to a local folder, not to gs://b/x'):
    export_folder('assets:tiny', 'gs://b/x')


def test_the_shipped_generator_is_exported_though_its_config_lacks_newer_fields(tmp_path):
  assert 'tokenizer' not in weights.read_config('assets:tiny')['data']
  lines = export_folder('assets:tiny', str(tmp_path / 'folder'))
  assert '  tokenizer: from assets:bpe' in lines
  assert weights.read_config(str(tmp_path / 'folder'))['data']['tokenizer'].startswith('bpe:')
