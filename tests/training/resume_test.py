"""Tests of the initial state of a run and of resuming."""

import dataclasses

import jax
import numpy as np
import pytest

from vpe_jax import rng, sharding
from vpe_jax.config import to_dict
from vpe_jax.contracts import UserError
from vpe_jax.training import resume


def test_free_fields_may_differ_and_are_named(line_config):
  config = line_config()
  stored = to_dict(config)
  ours = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=4))
  assert resume.check_config(ours, stored, 'RUN', ()) == ['mesh.data was 1, now 4']
  assert resume.check_config(config, stored, 'RUN', ()) == []


def test_allowing_a_section_allows_its_fields_only(line_config):
  config = line_config()
  ours = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=9.0), seed=4)
  with pytest.raises(UserError, match='seed was 0, now 4'):
    resume.check_config(ours, to_dict(config), 'RUN', ('optim',))
  with pytest.raises(UserError, match='optim.lr'):
    resume.check_config(ours, to_dict(config), 'RUN', ('optim.warmup', 'seed'))
  assert len(resume.check_config(ours, to_dict(config), 'RUN', ('optim.lr', 'seed'))) == 2


def test_the_named_flag_allows_all_of_many_differences(line_config):
  config = line_config()
  stored = to_dict(config)
  names = 'lr warmup b1 b2 eps weight_decay clip ema accumulate lr_end'
  fields = names.split()
  stored['optim'] |= dict.fromkeys(fields, 0.125)
  with pytest.raises(UserError, match='and 2 more') as error:
    resume.check_config(config, stored, 'RUN', ())
  flag = str(error.value).rpartition('--allow_change=')[2]
  assert len(resume.check_config(config, stored, 'RUN', flag.split(','))) == len(fields)


def test_unknown_allowed_field_is_refused(line_config):
  config = line_config()
  for field, hint in (('optim.l', 'optim.lr'), ('optin', 'optim'), ('step', 'steps')):
    with pytest.raises(UserError, match=f"names '{field}', .*did you mean '{hint}'"):
      resume.check_config(config, to_dict(config), 'RUN', (field,))
  resume.check_config(config, to_dict(config), 'RUN', ('data', 'optim.lr'))


def test_a_removed_field_is_the_only_difference_of_an_older_config(line_config):
  config = line_config()
  stored = to_dict(config)
  del stored['optim']['schedule']
  stored['optim']['removed'] = None
  with pytest.raises(UserError) as error:
    resume.check_config(config, stored, 'RUN', ())
  assert 'another config: optim.removed was None, now None. Choose' in str(error.value)


def test_long_lists_of_differences_are_truncated(line_config):
  config = line_config()
  stored = dict.fromkeys(to_dict(config))
  with pytest.raises(UserError, match=r'and \d+ more\. Choose another --workdir'):
    resume.check_config(config, stored, 'RUN', ())


def test_fresh_state_has_the_abstract_shapes_and_shardings(line_system):
  system = line_system()
  mesh = sharding.make_mesh(system.config.mesh)
  abstract = resume.abstract_state(system.config, system, 0, mesh)
  key = rng.run_key(0)
  state, origins = resume.fresh_state(system, abstract, {}, key)
  assert origins == dict.fromkeys(sharding.leaves_by_path(state['params']), 'initialized')
  jax.tree.map(lambda ours, spec: ours.sharding == spec.sharding or pytest.fail(), state, abstract)
  sharding.check_sharded_enough(
    {'kernel': state['params']['backbone']['kernel']},
    {'kernel': abstract['params']['backbone']['kernel'].sharding},
  )
  expected = system.init(rng.stream(key, 'init'))['head']['kernel']
  np.testing.assert_allclose(state['params']['head']['kernel'], expected, rtol=1e-5)
  later = resume.abstract_state(system.config, system, 1, mesh)
  assert abstract['ema'] == {} and later['ema'].keys() == {'backbone', 'head'}


def test_error_names_a_stage_that_the_config_lacks(line_system):
  system = line_system()
  mesh = sharding.make_mesh(system.config.mesh)
  with pytest.raises(UserError, match=r'in its stage 3, but the config names only 2 \(head, all\)'):
    resume.abstract_state(system.config, system, 2, mesh)


def test_error_names_a_multiplier_that_matches_nothing(line_system):
  system = line_system(optim={'multipliers': 'heads/=2'})
  with pytest.raises(UserError, match="optim.multipliers names 'heads/'"):
    resume.abstract_state(system.config, system, 0, sharding.make_mesh(system.config.mesh))


def test_field_missing_from_the_stored_config_has_its_default(line_config):
  config = line_config()
  stored = to_dict(config)
  del stored['quick_compile'], stored['optim']['ema']
  ours = dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema=0.9995))
  assert resume.check_config(ours, stored, 'RUN', ()) == []
  with pytest.raises(UserError, match='quick_compile was False, now True'):
    resume.check_config(dataclasses.replace(ours, quick_compile=True), stored, 'RUN', ())
