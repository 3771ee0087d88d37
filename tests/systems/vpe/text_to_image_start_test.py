"""Text to image initialized from Show-o2 in its released key layout."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch

from configs import t2i as config_file
from vpe_jax import convert, rng, sharding, systems
from vpe_jax.checkpoints import sources
from vpe_jax.config import to_dict
from vpe_jax.contracts import UserError
from vpe_jax.models.unified import UnifiedConfig
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import resume

pytestmark = pytest.mark.parity


def _system(show_o2, source, arch='internal', **model):
  """The debug config with the golden Show-o2's sizes."""
  config = config_file.get_config(f'debug,arch={arch}')
  config.data.source = 'synthetic'
  sizes = to_dict(show_o2.sizes)
  # The golden vocabulary is truncated: ids of the released one lie beyond it.
  for name in ('arch', 'codes', 'multiple', 'bos', 'boi'):
    sizes.pop(name)
  config.model.update({**config.model.to_dict(), **sizes, **model})
  config.model.update(image={'channels': show_o2.sizes.latent_channels}, init_from=str(source))
  return systems.build(config.to_dict())


def _fresh_state(system):
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    return resume.fresh_state(system, abstract, {}, rng.run_key(0))


def _assert_equal(ours, theirs):
  ours, theirs = leaves_by_path(ours), leaves_by_path(theirs)
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


@pytest.fixture(scope='module')
def released(show_o2, tmp_path_factory):
  """The golden weights as they are released: a pickled state dict."""
  path = tmp_path_factory.mktemp('showo2') / 'pytorch_model.bin'
  tensors = sources.open_source(str(show_o2.folder)).tensors
  state = {key: torch.tensor(tensor.read().astype(np.float32)) for key, tensor in tensors.items()}
  state['showo.lm_head.weight'] = state['showo.model.embed_tokens.weight']
  torch.save(state, path)
  return path


def _check(show_o2, system):
  (state, origins), golden = _fresh_state(system), show_o2.imported.params
  params, source = state['params'], system.config.model.init_from
  initialized = {path for path, origin in origins.items() if origin == 'initialized'}
  assert initialized == {'embed/codes'} and set(origins.values()) == {'initialized', source}
  _assert_equal(params['embed']['text'], golden['embed']['text'])
  codes = np.asarray(params['embed']['codes'])
  assert codes.shape[0] == system.codes + 2 and abs(codes.std() - 0.02) < 0.002
  for expert in ('ar', 'dit') if system.config.model.arch == 'internal' else ('ar',):
    for part in ('layers', 'norm'):
      _assert_equal(params[expert][part], golden['ar'][part])
  for part in ('dual_path', 'head'):
    _assert_equal(params['dit'][part], golden['dit'][part])
  fields = {f.name: getattr(system.config.model, f.name) for f in dataclasses.fields(UnifiedConfig)}
  sizes = UnifiedConfig(**fields | {'multiple': 1})
  _, velocity = show_o2.run(params, sizes)
  expected = show_o2.io['velocity']
  error = np.max(np.abs(velocity.transpose(0, 3, 1, 2) - expected)) / np.max(np.abs(expected))
  assert error < 2e-5


@pytest.mark.parametrize('arch', ['internal', 'single'])
def test_both_experts_start_as_show_o2_and_predict_its_velocity(show_o2, released, arch):
  system = _system(show_o2, released, arch)
  _check(show_o2, system)


def test_an_import_serves_as_well(show_o2, tmp_path):
  published, imported = tmp_path / 'published', str(tmp_path / 'imported')
  shutil.copytree(show_o2.folder, published)
  config = json.loads((published / 'config.json').read_text())
  ours = config_file.get_config('debug').model
  config |= {'bos_token_id': ours.bos, 'boi_token_id': ours.boi}
  (published / 'config.json').write_text(json.dumps(config))
  alone = convert.Companions(wanted=False)
  convert.import_weights('showo2', str(published), imported, companions=alone)
  _check(show_o2, _system(show_o2, imported))
  with pytest.raises(UserError, match='the showo2 of the config: bos is 2, not 7'):
    _fresh_state(_system(show_o2, imported, arch='single', bos=7))


def test_weights_of_other_sizes_or_none_are_refused(show_o2, released):
  with pytest.raises(UserError, match="'showo.model.embed_tokens.weight' has the wrong shape"):
    _fresh_state(_system(show_o2, released, text_vocab=17))
  with pytest.raises(UserError, match='no such file or folder'):
    _fresh_state(_system(show_o2, '/nowhere/showo2'))


def test_the_paper_starts_from_the_released_model():
  config = config_file.get_config('paper')
  config.data.source = 'synthetic'
  (start,) = systems.build(config.to_dict()).initialization.pretrained
  assert (start.family, start.source) == ('showo2', 'showlab/show-o2-1.5B-HQ')
