"""Tests of runs initialized from published weights, an import or a parent run."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from configs import siglip as config_file
from configs import t2i as t2i_file
from vpe_jax import convert, rng, sharding, systems
from vpe_jax.checkpoints import convert as paths
from vpe_jax.checkpoints import weights
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.codecs.siglip_vq import SiglipVqSection
from vpe_jax.config import CheckpointConfig, to_dict
from vpe_jax.contracts import COUNTERS, UserError
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import pretrained, report, resume


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  folder = tmp_path_factory.mktemp('out') / 'siglip'
  convert.export_weights('siglip', 'assets:siglip', str(folder))
  return folder


def _started(source, **siglip):
  config = config_file.get_config('tiny')
  config.model.init_from = str(source)
  config.model.siglip.update(siglip)
  system = systems.build(config.to_dict())
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    return system, abstract, *resume.fresh_state(system, abstract, {}, rng.run_key(0))


def _check(found):
  system, abstract, state, origins = found
  wanted = leaves_by_path(weights.load('assets:siglip')[0])
  leaves, placed = leaves_by_path(state['params']), leaves_by_path(abstract['params'])
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, wanted[path])
    assert leaf.sharding == placed[path].sharding
  for path, leaf in leaves_by_path(state['ema']).items():
    np.testing.assert_array_equal(leaf, wanted[path])
  assert origins == dict.fromkeys(leaves, system.config.model.init_from)


def test_run_is_initialized_from_published_weights(published):
  _check(_started(published))


def test_run_is_initialized_from_an_import(published, tmp_path):
  kept = tmp_path / 'kept'
  convert.import_weights('siglip', str(published), str(kept))
  _check(_started(kept))
  with pytest.raises(UserError, match='the sizes of the siglip'):
    _started(kept, patch=12)


def test_weights_of_another_size_or_none_are_refused(published, tmp_path):
  with pytest.raises(UserError, match='wrong shape'):
    _started(published, patch=12)
  with pytest.raises(UserError, match='no such file or folder'):
    _started(tmp_path / 'none')


def test_parameters_are_random_without_initial_weights():
  state = _started('')[2]
  token = weights.load('assets:siglip')[0]['text']['token']
  assert not np.array_equal(state['params']['text']['token'], token)


def _t2i(arch, **changes):
  config = t2i_file.get_config(f'debug,arch={arch}')
  config.data.source = 'synthetic'
  values = config.to_dict() | changes
  if 'stages' in changes:
    values |= {'steps': 4, 'batch_size': 8}
  return systems.build(values)


def _first(system):
  """(abstract state, state, origins) of a new run."""
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    return abstract, *resume.fresh_state(system, abstract, {}, rng.run_key(7))


def _keep(state, system, folder):
  """A run's workdir with one checkpoint."""
  store = Store(str(folder / FOLDER), CheckpointConfig())
  store.save(dict.fromkeys(COUNTERS, 1) | state, to_dict(system.config), force=True)
  store.close()


@pytest.fixture(scope='module')
def plan_run(tmp_path_factory):
  """A run that trained stage plan of `arch=internal`: its folder and its parameters."""
  folder, system = tmp_path_factory.mktemp('plan'), _t2i('internal', stages=['plan'])
  draw = np.random.default_rng(0)
  normal = lambda leaf: draw.standard_normal(leaf.shape, np.float32)
  params = jax.tree.map(normal, jax.eval_shape(system.init, rng.run_key(0)))
  _keep({'params': params, 'opt_state': {}, 'ema': {}}, system, folder)
  return folder, leaves_by_path(params)


@pytest.mark.parametrize('arch, stage', [('internal', 'joint'), ('external', 'render')])
def test_both_architectures_continue_from_one_parent_run(plan_run, arch, stage):
  folder, wanted = plan_run
  system = _t2i(arch, start=str(folder), stages=[stage], seed=3)
  abstract, state, origins = _first(system)
  found, placed = leaves_by_path(state['params']), leaves_by_path(abstract['params'])
  assert found.keys() == wanted.keys()
  for path, leaf in found.items():
    np.testing.assert_array_equal(leaf, wanted[path])
    assert leaf.sharding == placed[path].sharding
  # Optimizer, average and counters begin afresh.
  for path, leaf in leaves_by_path(state['ema']).items():
    np.testing.assert_array_equal(leaf, wanted[path])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state['opt_state']))
  assert int(state['step']) == int(state['examples_seen']) == 0
  given = (report.Networks({}, {}), system.stages[0], system.config.optim, origins)
  table = report.parameters_text(state['params'], *given)
  rows = {line.split()[0]: line for line in table.splitlines()[1:]}
  assert all(line.endswith(f'{folder} (raw)') for line in rows.values())
  assert 'trains' in rows['dit'] and ('frozen' in rows['ar']) == (arch == 'external')


def test_other_tokenizers_and_codecs_of_a_parent_run_are_reported(plan_run):
  folder, _ = plan_run
  same = _t2i('external', start=str(folder), stages=['render']).config
  stored = to_dict(_t2i('internal', stages=['plan']).config)
  assert not pretrained.encoding_differences(same, str(folder), stored)
  codec = dataclasses.replace(same.model.visual_prompt, weights='other.safetensors')
  ours = dataclasses.replace(same, model=dataclasses.replace(same.model, visual_prompt=codec))
  (line,) = pretrained.encoding_differences(ours, str(folder), stored)
  assert line.startswith(f'{folder} was trained with model.visual_prompt.weights=assets:feature_vq')
  assert 'other.safetensors' in line
  other = dataclasses.replace(same.model, visual_prompt=SiglipVqSection(codes=same.model.codes))
  (line,) = pretrained.encoding_differences(dataclasses.replace(same, model=other), 'RUN', stored)
  assert line.startswith('RUN was trained with model.visual_prompt.kind=feature_vq')


def test_cross_attention_that_the_parent_run_lacks_is_random(plan_run):
  folder, wanted = plan_run
  config = t2i_file.get_config('debug,arch=external')
  model = config.model.to_dict() | {'condition': 'cross'}
  system = _t2i('external', start=str(folder), stages=['render'], model=model)
  found = leaves_by_path(_first(system)[1]['params'])
  drawn = {path for path in found if path not in wanted}
  assert drawn and all(path.startswith('dit/layers/cross/') for path in drawn)
  for path, leaf in wanted.items():
    np.testing.assert_array_equal(found[path], leaf)
  assert not np.any(found['dit/layers/cross/o/kernel'])
  assert np.any(found['dit/layers/cross/q/kernel'])


def test_run_is_initialized_from_raw_or_ema_weights(line_system, tmp_path):
  other = line_system()
  params = other.init(rng.run_key(0))
  # An average of what trains; the rest is as it is.
  average = {'head': jax.tree.map(lambda leaf: leaf + 1, params['head'])}
  _keep({'params': params, 'opt_state': {}, 'ema': average}, other, tmp_path)
  raw = leaves_by_path(params)
  for which, shift in (('raw', 0), ('ema', 1)):
    found = _first(line_system(start=str(tmp_path), start_weights=which))[1]['params']
    for path, leaf in leaves_by_path(found).items():
      np.testing.assert_array_equal(leaf, raw[path] + (shift if path.startswith('head') else 0))


def test_missing_or_misfitting_parent_run_is_refused(plan_run, line_system, tmp_path):
  folder = plan_run[0]
  cases = [
    (_t2i('single', start=str(folder)), "config.start .*'dit/layers/.*' is .* there and absent"),
    (line_system(start=str(folder)), 'config.start has other parameters .* name a run'),
    (line_system(start=str(tmp_path / 'none')), 'none has no checkpoint yet'),
  ]
  for system, message in cases:
    with pytest.raises(UserError, match=message) as error:
      _first(system)
    assert '\n' not in str(error.value)


def test_parameter_groups_come_from_different_parent_runs(plan_run, tmp_path):
  folder, wanted = plan_run
  other = _t2i('internal', stages=['plan'])
  shifted = jax.tree.map(lambda leaf: leaf + 1, paths.tree(wanted))
  _keep({'params': shifted, 'opt_state': {}, 'ema': {}}, other, tmp_path)
  for start in (f'{folder}, dit={tmp_path}', f'dit={tmp_path},embed={folder},ar={folder}'):
    _, state, origins = _first(_t2i('external', start=start, stages=['render']))
    for path, leaf in leaves_by_path(state['params']).items():
      moved = path.startswith('dit/')
      np.testing.assert_array_equal(leaf, wanted[path] + moved)
      assert origins[path] == f'{tmp_path if moved else folder} (raw)'


def test_groups_without_a_parent_run_are_random(plan_run):
  folder, wanted = plan_run
  _, state, origins = _first(_t2i('internal', start=f'ar = {folder}', stages=['joint']))
  assert {path for path, origin in origins.items() if origin != 'initialized'} == {
    path for path in wanted if path.startswith('ar/')
  }
  found = leaves_by_path(state['params'])
  assert np.array_equal(found['ar/norm/scale'], wanted['ar/norm/scale'])
  assert not np.array_equal(found['embed/codes'], wanted['embed/codes'])


@pytest.mark.parametrize(
  'arch, start, message',
  [
    ('external', 'dit=RUN', r'freezes the token expert \(ar, embed\), and nothing has trained it'),
    ('external', 'ar=RUN', r'freezes the token expert \(ar, embed\), and nothing has trained it'),
    ('internal', 'RUN,dot=RUN', "takes dot/ from RUN, .* did you mean 'dit/'"),
    ('internal', 'dit=RUN,dit=RUN', 'two runs for the same parameters'),
    ('internal', 'RUN, dit=', 'name a run after dit='),
  ],
)
def test_invalid_groups_of_parent_runs_are_one_line_errors(plan_run, arch, start, message):
  stage, folder = {'external': 'render', 'internal': 'joint'}[arch], str(plan_run[0])
  with pytest.raises(UserError, match=message.replace('RUN', folder)) as error:
    _first(_t2i(arch, start=start.replace('RUN', folder), stages=[stage]))
  assert '\n' not in str(error.value)
