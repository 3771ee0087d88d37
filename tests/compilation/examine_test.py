"""Tests of compilation reports on virtual devices and of one-line errors."""

from __future__ import annotations

import json

import jax
import pytest

from configs import codec, t2i
from vpe_jax import systems
from vpe_jax.checkpoints import frozen
from vpe_jax.compilation import examine
from vpe_jax.compilation.examine import Request
from vpe_jax.contracts import UserError

KEYS = {
  'parameters', 'trainable_parameters', 'chips', 'peak_bytes_per_device', 'hbm_bytes_per_device',
  'hbm_fraction', 'model_flops_per_step', 'hlo_flops_per_step', 'collective_bytes',
  'step_time_bound_s', 'mfu_bound', 'bound_by', 'images_per_step',
}  # fmt: skip


def _config(**data) -> dict:
  config = t2i.get_config('debug')
  config.data.update(data)
  return config.to_dict()


def test_report_of_a_training_step_on_virtual_devices(monkeypatch):
  monkeypatch.setattr(examine, 'MIN_WARNED_BYTES', 1000)
  report = examine.examine(_config(), Request('cpu:8', stage='plan', images_per_chip=2))
  values = json.loads(json.dumps(report.as_dict()))
  assert values.keys() >= KEYS
  assert (values['chips'], values['images_per_step'], values['images_per_chip']) == (8, 16, 2)
  assert values['parameters'] > values['trainable_parameters'] > 0
  assert values['argument_bytes_per_device'] > 0 and values['temporary_bytes_per_device'] > 0
  assert values['frozen_bytes_per_device'] > 0
  assert values['hlo_flops_per_step'] >= 0.97 * values['model_flops_per_step'] > 0
  assert values['collective_bytes'].keys() >= {'all-gather', 'all-reduce'}
  assert values['bound_by'] is None and values['hbm_fraction'] is None and values['fits']
  (warning,) = report.warnings
  assert 'all-reduce' in warning and 'ar/layers/' in warning
  text = report.text()
  assert text.count('warning:') == 1
  for part in ('peak', 'arguments', 'temporaries', 'parameters:', 'trainable', 'bound: none'):
    assert part in text


def test_online_encoders_are_arguments_of_the_step():
  request = Request('cpu:2', stage='plan', images_per_chip=1)
  online = examine.examine(_config(encode='online'), request)
  cached = examine.examine(_config(), request)
  # Image tower and quantizer are added. `frozen_bytes` also counts text tower and autoencoder,
  # which this stage doesn't use.
  added = online.usage.arguments - cached.usage.arguments
  assert 0.2 * online.frozen_bytes < added < online.frozen_bytes
  assert online.work.flops > cached.work.flops and online.model_flops > cached.model_flops


def test_sampling_flops_count_every_loop_iteration():
  report = examine.examine(_config(), Request('cpu:1', program='sample', images_per_chip=1))
  assert report.as_dict()['program'] == 'sample'
  system = systems.build(_config())
  networks = frozen.abstract_params(system)
  used = jax.tree.leaves([networks[name] for name in system.sampling_networks])
  assert report.frozen_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in used)
  # The decoding loop's body counts once per token, the flow loop's once per step.
  assert report.work.flops == pytest.approx(report.model_flops, rel=0.15)


def test_invalid_requests_are_one_line_errors():
  for request, message in (
    (Request('cpu:8', stage='plam'), "did you mean 'plan'"),
    (Request('cpu:8', program='draw'), 'train or sample'),
    (Request('cpu:8', images_per_chip=0), 'at least 1'),
    (Request('cpu:8', dtype='bfloat16'), '--config.dtype=bfloat16'),
    (Request('cpu:8', mesh={'data': 3}), 'does not fit 8 devices'),
    (Request('cpu:3'), 'batch_size 8 does not divide over 3 batch shards'),
  ):
    with pytest.raises(UserError, match=message) as error:
      examine.examine(_config(), request)
    assert '\n' not in str(error.value)
  for text in ('data', 'rows=2', 'fsdp=0', 'data=1.5', 'data=2,data=4'):
    with pytest.raises(UserError, match='data=4,fsdp=64'):
      examine.parse_mesh(text)
  assert examine.parse_mesh('data=4,fsdp=-1') == {'data': 4, 'fsdp': -1}


def test_a_system_that_does_not_sample_is_refused():
  config = codec.get_config('debug').to_dict()
  with pytest.raises(UserError, match="the system 'codec'"):
    examine.examine(config, Request('cpu:8', program='sample'))


def test_encoders_that_do_not_fit_the_model_are_refused():
  with pytest.raises(UserError, match='data.image_size is 70'):
    examine.examine(_config(encode='online', image_size=70), Request('cpu:8'))


def test_sharding_constraints_reduce_memory(monkeypatch):
  """Without `sharding.constrain` at block boundaries the compiler replicates the batch."""
  config = t2i.get_config('debug')
  config.remat = 'full'
  request = Request('cpu:8', stage='plan', images_per_chip=16)
  constrained = examine.examine(config.to_dict(), request).usage.temporary
  jax.clear_caches()
  monkeypatch.setattr('vpe_jax.sharding.constrain', lambda x, names: x)
  assert examine.examine(config.to_dict(), request).usage.temporary > 1.5 * constrained
  jax.clear_caches()  # No later test gets a program without constraints.
