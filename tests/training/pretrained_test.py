"""Tests of runs initialized from published weights, an import or a parent run."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import siglip as config_file
from configs import t2i as t2i_file
from tests.outcomes import result_of
from vpe_jax import convert, rng, sharding, systems
from vpe_jax.checkpoints import convert as paths
from vpe_jax.checkpoints import weights
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.codecs.siglip_vq import SiglipVqSection
from vpe_jax.config import CheckpointConfig, to_dict
from vpe_jax.contracts import COUNTERS, UserError
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import config_file as overriding
from vpe_jax.training import pretrained, report, resume


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  folder = tmp_path_factory.mktemp('out') / 'siglip'
  convert.export_weights('siglip', 'assets:siglip', str(folder))
  return folder


def _siglip_run(source, **siglip):
  """(system, abstract state, state, origins) of a new SigLIP run initialized from `source`."""
  config = config_file.get_config('tiny')
  config.model.init_from = str(source)
  config.model.siglip.update(siglip)
  system = systems.build(config.to_dict())
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    return system, abstract, *resume.fresh_state(system, abstract, {}, rng.run_key(0))


def _assert_initialized_from_asset(run):
  system, abstract, state, origins = run
  expected = leaves_by_path(weights.load('assets:siglip')[0])
  leaves, abstract_leaves = leaves_by_path(state['params']), leaves_by_path(abstract['params'])
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, expected[path])
    assert leaf.sharding == abstract_leaves[path].sharding
  for path, leaf in leaves_by_path(state['ema']).items():
    np.testing.assert_array_equal(leaf, expected[path])
  assert origins == dict.fromkeys(leaves, system.config.model.init_from)


def test_run_is_initialized_from_published_weights(published):
  _assert_initialized_from_asset(_siglip_run(published))


def test_run_is_initialized_from_an_import(published, tmp_path):
  folder = tmp_path / 'imported'
  convert.import_weights('siglip', str(published), str(folder))
  _assert_initialized_from_asset(_siglip_run(folder))
  with pytest.raises(UserError, match='the siglip of the config: patch is 8, not 12'):
    _siglip_run(folder, patch=12)


def test_weights_of_another_size_or_none_are_refused(published, tmp_path):
  with pytest.raises(UserError, match='the siglip of the config: patch is 8, not 12'):
    _siglip_run(published, patch=12)
  with pytest.raises(UserError, match='no such file or folder'):
    _siglip_run(tmp_path / 'none')


def test_parameters_are_random_without_initial_weights():
  state = _siglip_run('')[2]
  token = weights.load('assets:siglip')[0]['text']['token']
  assert not np.array_equal(state['params']['text']['token'], token)


def _t2i(arch, **changes):
  config = t2i_file.get_config(f'debug,arch={arch}')
  config.data.source = 'synthetic'
  values = config.to_dict() | changes
  if 'stages' in changes:
    values |= {'steps': 4, 'batch_size': 8}
  return systems.build(values)


def _initial_state(system):
  """(abstract state, state, origins) of a new run."""
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    return abstract, *resume.fresh_state(system, abstract, {}, rng.run_key(7))


def _save_checkpoint(state, system, folder):
  """Makes `folder` the workdir of a run with one checkpoint."""
  store = Store(str(folder / FOLDER), CheckpointConfig())
  store.save(dict.fromkeys(COUNTERS, 1) | state, to_dict(system.config), force=True)
  store.close()


@pytest.fixture(scope='module')
def plan_run(tmp_path_factory):
  """Workdir and parameters of a run that trained stage plan of `arch=internal`."""
  folder, system = tmp_path_factory.mktemp('plan'), _t2i('internal', stages=['plan'])
  generator = np.random.default_rng(0)
  normal = lambda leaf: generator.standard_normal(leaf.shape, np.float32)
  params = jax.tree.map(normal, jax.eval_shape(system.init, rng.run_key(0)))
  _save_checkpoint({'params': params, 'opt_state': {}, 'ema': {}}, system, folder)
  return folder, leaves_by_path(params)


@pytest.mark.parametrize('arch, stage', [('internal', 'joint'), ('external', 'render')])
def test_both_architectures_continue_from_one_parent_run(plan_run, arch, stage):
  folder, expected = plan_run
  system = _t2i(arch, start=str(folder), stages=[stage], seed=3)
  abstract, state, origins = _initial_state(system)
  leaves, abstract_leaves = leaves_by_path(state['params']), leaves_by_path(abstract['params'])
  assert leaves.keys() == expected.keys()
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(leaf, expected[path])
    assert leaf.sharding == abstract_leaves[path].sharding
  # Optimizer state, EMA and counters start anew.
  for path, leaf in leaves_by_path(state['ema']).items():
    np.testing.assert_array_equal(leaf, expected[path])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state['opt_state']))
  assert int(state['step']) == int(state['examples_seen']) == 0
  arguments = (report.Networks({}, {}), system.stages[0], system.config.optim, origins)
  table = report.parameters_text(state['params'], *arguments)
  lines = {line.split()[0]: line for line in table.splitlines()[1:]}
  assert all(line.endswith(f'{folder} (raw)') for line in lines.values())
  assert 'trains' in lines['dit'] and ('frozen' in lines['ar']) == (arch == 'external')


def test_encoding_differences_from_the_parent_run_are_reported(plan_run):
  folder, _ = plan_run
  config = _t2i('external', start=str(folder), stages=['render']).config
  stored = to_dict(_t2i('internal', stages=['plan']).config)
  assert not pretrained.encoding_differences(config, str(folder), stored)
  codec = dataclasses.replace(config.model.visual_prompt, weights='other.safetensors')
  model = dataclasses.replace(config.model, visual_prompt=codec)
  changed = dataclasses.replace(config, model=model)
  (line,) = pretrained.encoding_differences(changed, str(folder), stored)
  assert line.startswith(f'{folder} was trained with model.visual_prompt.weights=assets:feature_vq')
  assert 'other.safetensors' in line
  codec = SiglipVqSection(codes=config.model.codes)
  model = dataclasses.replace(config.model, visual_prompt=codec)
  changed = dataclasses.replace(config, model=model)
  (line,) = pretrained.encoding_differences(changed, 'RUN', stored)
  assert line.startswith('RUN was trained with model.visual_prompt.kind=feature_vq')


def test_cross_attention_that_the_parent_run_lacks_is_random(plan_run):
  folder, expected = plan_run
  config = t2i_file.get_config('debug,arch=external')
  model = config.model.to_dict() | {'condition': 'cross'}
  system = _t2i('external', start=str(folder), stages=['render'], model=model)
  leaves = leaves_by_path(_initial_state(system)[1]['params'])
  initialized = {path for path in leaves if path not in expected}
  assert initialized and all(path.startswith('dit/layers/cross/') for path in initialized)
  for path, leaf in expected.items():
    np.testing.assert_array_equal(leaves[path], leaf)
  assert not np.any(leaves['dit/layers/cross/o/kernel'])
  assert np.any(leaves['dit/layers/cross/q/kernel'])


def test_run_is_initialized_from_raw_or_ema_weights(line_system, tmp_path):
  parent = line_system()
  params = parent.init(rng.run_key(0))
  # Only trainable parameters have an EMA.
  ema = {'head': jax.tree.map(lambda leaf: leaf + 1, params['head'])}
  _save_checkpoint({'params': params, 'opt_state': {}, 'ema': ema}, parent, tmp_path)
  raw = leaves_by_path(params)
  for kind, shift in (('raw', 0), ('ema', 1)):
    loaded = _initial_state(line_system(start=str(tmp_path), start_weights=kind))[1]['params']
    for path, leaf in leaves_by_path(loaded).items():
      np.testing.assert_array_equal(leaf, raw[path] + (shift if path.startswith('head') else 0))


def test_run_is_initialized_from_an_exported_file(line_system, tmp_path):
  run, file = tmp_path / 'run', str(tmp_path / 'line.safetensors')
  parent = line_system()
  params = parent.init(rng.run_key(0))
  weights.save(file, params, {'config': json.dumps(to_dict(parent.config)), 'weights': 'ema'})
  _save_checkpoint({'params': params, 'opt_state': {}, 'ema': {}}, parent, run)
  expected = leaves_by_path(weights.load(file)[0])
  _, state, origins = _initial_state(line_system(start=file))
  for path, leaf in leaves_by_path(state['params']).items():
    np.testing.assert_array_equal(leaf, expected[path])
  assert set(origins.values()) == {f'{file} (ema)'}
  with pytest.raises(UserError, match='start_weights is state, but .* has only parameters'):
    _initial_state(line_system(start=file, start_weights='state'))


def test_the_shipped_generator_starts_a_run():
  overrides = {'start': 'assets:tiny', 'stages': 'joint'}
  system = systems.build(overriding.load('configs/t2i.py', overrides))
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    loaded = result_of(pretrained.load, system, abstract)
  assert set(loaded.origins.values()) == {'assets:tiny (ema)'}
  assert loaded.origins.keys() == leaves_by_path(abstract['params']).keys()


def test_missing_or_misfitting_parent_run_is_refused(plan_run, line_system, tmp_path):
  folder = plan_run[0]
  cases = [
    (_t2i('single', start=str(folder)), "config.start .*'dit/layers/.*' is .* there and absent"),
    (line_system(start=str(folder)), 'config.start has other parameters .* name weights'),
    (line_system(start=str(tmp_path / 'none')), 'none has no checkpoint yet'),
  ]
  for system, message in cases:
    with pytest.raises(UserError, match=message) as error:
      _initial_state(system)
    assert '\n' not in str(error.value)


def test_parameter_groups_come_from_different_parent_runs(plan_run, tmp_path):
  folder, expected = plan_run
  parent = _t2i('internal', stages=['plan'])
  shifted = jax.tree.map(lambda leaf: leaf + 1, paths.tree(expected))
  _save_checkpoint({'params': shifted, 'opt_state': {}, 'ema': {}}, parent, tmp_path)
  for start in (f'{folder}, dit={tmp_path}', f'dit={tmp_path},embed={folder},ar={folder}'):
    _, state, origins = _initial_state(_t2i('external', start=start, stages=['render']))
    for path, leaf in leaves_by_path(state['params']).items():
      is_dit = path.startswith('dit/')
      np.testing.assert_array_equal(leaf, expected[path] + is_dit)
      assert origins[path] == f'{tmp_path if is_dit else folder} (raw)'


def test_groups_without_a_parent_run_are_random(plan_run):
  folder, expected = plan_run
  _, state, origins = _initial_state(_t2i('internal', start=f'ar = {folder}', stages=['joint']))
  assert {path for path, origin in origins.items() if origin != 'initialized'} == {
    path for path in expected if path.startswith('ar/')
  }
  leaves = leaves_by_path(state['params'])
  assert np.array_equal(leaves['ar/norm/scale'], expected['ar/norm/scale'])
  assert not np.array_equal(leaves['embed/codes'], expected['embed/codes'])


@pytest.mark.parametrize(
  'arch, start, message',
  [
    ('external', 'dit=RUN', r'freezes the AR expert \(ar, embed\), and nothing has trained it'),
    ('external', 'ar=RUN', r'freezes the AR expert \(ar, embed\), and nothing has trained it'),
    ('internal', 'RUN,dot=RUN', "takes dot/ from RUN, .* did you mean 'dit/'"),
    ('internal', 'dit=RUN,dit=RUN', 'two runs for the same parameters'),
    ('internal', 'RUN, dit=', 'name a run after dit='),
  ],
)
def test_invalid_groups_of_parent_runs_are_one_line_errors(plan_run, arch, start, message):
  stage, folder = {'external': 'render', 'internal': 'joint'}[arch], str(plan_run[0])
  with pytest.raises(UserError, match=message.replace('RUN', folder)) as error:
    _initial_state(_t2i(arch, start=start.replace('RUN', folder), stages=[stage]))
  assert '\n' not in str(error.value)
