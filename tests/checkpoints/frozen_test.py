"""Tests that frozen networks that don't fit the model are refused before training."""

import dataclasses
import re

import numpy as np
import pytest

from configs import codec, t2i
from tests.outcomes import refusal_of
from vpe_jax import systems
from vpe_jax.checkpoints import frozen, weights
from vpe_jax.contracts import UserError


def _system(config_file, arg, changes):
  config = config_file.get_config(arg)
  config.update_from_flattened_dict(changes)
  return systems.build(config.to_dict())


def _check(system):
  sources = {name: network.source for name, network in system.frozen.items()}
  frozen.check_fits(system, {name: weights.load(source)[0] for name, source in sources.items()})


@pytest.mark.parametrize('config_file', [t2i, codec])
def test_shipped_networks_fit(config_file):
  _check(_system(config_file, 'debug', {}))


@pytest.mark.parametrize(
  'config_file, arg, changes, message',
  [
    (
      t2i,
      'debug',
      {'model.visual_prompt': {'tower_weights': 'assets:evaluator_network'}},
      'siglip=assets:evaluator_network.*not fit',
    ),
    (
      codec,
      'debug',
      {'model.siglip_weights': 'assets:evaluator_network'},
      'siglip=assets:evaluator_network.*not fit',
    ),
    (t2i, 'debug', {'data.image_size': 128}, 'data.image_size is 128: it must be 64'),
    (
      t2i,
      'debug',
      {'data.source': 'synthetic', 'data.encode': 'online'},
      'data.source=synthetic trains without encoders.*set data.encode=cached',
    ),
  ],
)
def test_misfitting_networks_are_one_line_errors(config_file, arg, changes, message):
  with pytest.raises(UserError, match=message) as error:
    _check(_system(config_file, arg, changes))
  assert '\n' not in str(error.value)


def test_latents_of_another_shape_are_a_one_line_error():
  system = _system(t2i, 'debug', {})
  data = dataclasses.replace(system.config.data, image_size=128)
  system.config = dataclasses.replace(system.config, data=data)
  message = refusal_of(_check, system)
  assert re.search(r'latents .*\[32, 32, 4\].* takes \[16, 16, 4\]', message)


def test_file_with_all_networks_of_a_run_is_refused_as_one_network(tmp_path):
  path = str(tmp_path / 'run.safetensors')
  weights.save(path, {'image': weights.load('assets:image')[0], 'other': np.ones(2)}, {})
  with pytest.raises(UserError, match=f'image={path}.*do not fit'):
    _check(_system(t2i, 'debug', {'model.image': {'weights': path}}))


def test_synthetic_codes_need_no_networks(line_system):
  _check(_system(t2i, 'debug', {'data.source': 'synthetic'}))
  _check(line_system())
