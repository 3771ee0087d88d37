"""Runs that start from published weights, from an import of them, and what can be wrong."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from configs import siglip as config_file
from vpe_jax import convert, rng, sharding, systems
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.sharding import by_path
from vpe_jax.training import resume


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  folder = tmp_path_factory.mktemp('out') / 'siglip'
  convert.send_out('siglip', 'assets:siglip', str(folder))
  return folder


def _started(source, **siglip):
  config = config_file.get_config('tiny')
  config.model.init_from = str(source)
  config.model.siglip.update(siglip)
  system = systems.build(config.to_dict())
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    state = resume.fresh_state(system, abstract, {}, rng.run_key(0))
  return system, abstract, state


def _check(found):
  system, abstract, state = found
  wanted = by_path(weights.load('assets:siglip')[0])
  leaves, placed = by_path(state['params']), by_path(abstract['params'])
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, wanted[path])
    assert leaf.sharding == placed[path].sharding
  for path, leaf in by_path(state['ema']).items():
    np.testing.assert_array_equal(leaf, wanted[path])
  assert system.stages[0].source == system.config.model.init_from


def test_a_run_starts_from_published_weights(published):
  _check(_started(published))


def test_a_run_starts_from_an_import(published, tmp_path):
  kept = tmp_path / 'kept'
  convert.bring_in('siglip', str(published), str(kept))
  _check(_started(kept))
  with pytest.raises(UserError, match='other sizes'):
    _started(kept, patch=12)


def test_weights_of_another_size_or_none_are_refused(published, tmp_path):
  with pytest.raises(UserError, match='wrong shape'):
    _started(published, patch=12)
  with pytest.raises(UserError, match='no such file or folder'):
    _started(tmp_path / 'none')


def test_without_weights_to_start_from_parameters_are_drawn():
  state = _started('')[2]
  token = weights.load('assets:siglip')[0]['text']['token']
  assert not np.array_equal(state['params']['text']['token'], token)
