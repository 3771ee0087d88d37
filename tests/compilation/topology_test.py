"""Tests of valid and invalid names of TPU slices."""

from __future__ import annotations

import importlib.util

import pytest

from vpe_jax.compilation import topology
from vpe_jax.contracts import UserError
from vpe_jax.devices import CHIPS, PEAK_FLOPS


@pytest.mark.parametrize(
  'text, name, cloud, chips',
  [
    ('v5p:4x4x8', 'v5p:4x4x8', 'v5p-256', 128),
    ('v5p-128', 'v5p:4x4x4', 'v5p-128', 64),
    ('v5p:4x4x6', 'v5p:4x4x6', 'v5p-192', 96),
    ('v4-128', 'v4:4x4x4', 'v4-128', 64),
    ('v5litepod-256', 'v5e:16x16', 'v5litepod-256', 256),
    ('v5e-16', 'v5e:4x4', 'v5litepod-16', 16),
    ('v6e-256', 'v6e:16x16', 'v6e-256', 256),
    ('v5p-12288', 'v5p:16x16x24', 'v5p-12288', 6144),
    ('tpu7x-18432', 'tpu7x:16x24x24', 'tpu7x-18432', 9216),
    ('cpu:8', 'cpu:8', None, 8),
  ],
)
def test_grid_and_cloud_names_are_parsed(text, name, cloud, chips):
  target = topology.parse(text)
  assert (target.name, target.cloud_name, target.chips) == (name, cloud, chips)


def test_a_chip_of_two_devices_is_a_compilation_target():
  target = topology.parse('tpu7x:2x2x1')
  assert (target.chips, target.devices, len(topology.devices(target))) == (4, 8, 8)
  largest = topology.parse('tpu7x:8x8x8')
  assert (largest.chips, largest.devices, len(topology.devices(largest))) == (512, 1024, 1024)
  assert PEAK_FLOPS['TPU7x'] == 1153.5e12


def test_several_slices_multiply_the_chips():
  target = topology.parse('v5p:4x4x4', 4)
  assert (target.name, target.chips, target.cloud_name) == ('4 x v5p:4x4x4', 256, 'v5p-128')


@pytest.mark.parametrize(
  'text, slices, message',
  [
    ('v5e:16x32', 1, 'largest slice of v5e is 16x16'),
    ('v5e:1x256', 1, 'largest slice of v5e is 16x16'),
    ('v6e:32x32', 1, '--slices=N'),
    ('v5p:16x16x32', 1, r'16x16x24 \(6,144 chips\)'),
    ('tpu7x:4x4', 1, 'tpu7x has 3 dimensions'),
    ('v4:16x16x24', 1, r'16x16x16 \(4,096 chips\)'),
    ('v5e:2x2x2', 1, 'v5e has 2 dimensions, such as v5e:4x4'),
    ('v5p:4x4', 1, 'v5p has 3 dimensions'),
    ('v5e:0x4', 1, 'dimensions'),
    ('v5p-100', 1, 'no such slice; use one of v5p-8, v5p-16'),
    ('v8:2x2', 1, "unknown chip 'v8'; did you mean"),
    ('a pod', 1, 'v5p:4x4x8, a Google Cloud name such as v5p-256, or cpu:8'),
    ('v5e:2x2', 0, 'at least 1'),
    ('cpu:8', 2, 'single slice'),
    ('cpu:0', 1, 'from 1 to 4,096'),
    ('cpu:99999999999999999999', 1, 'from 1 to 4,096'),
    ('cpu:8x2', 1, 'from 1 to 4,096'),
    ('cpu:\u0668', 1, 'from 1 to 4,096'),
  ],
)
def test_invalid_names_are_one_line_errors(text, slices, message):
  with pytest.raises(UserError, match=message) as error:
    topology.parse(text, slices)
  assert '\n' not in str(error.value)


def test_virtual_devices_are_limited_by_the_xla_flag():
  assert len(topology.devices(topology.parse('cpu:8'))) == 8
  with pytest.raises(UserError, match='xla_force_host_platform_device_count=4096'):
    topology.devices(topology.parse('cpu:4096'))


def test_missing_libtpu_names_the_cure(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: None if name == 'libtpu' else find(name)
  )
  with pytest.raises(UserError, match='pip install libtpu'):
    topology.devices(topology.parse('v5e:2x2'))


def test_chip_specifications_are_plausible():
  for chip in CHIPS.values():
    assert PEAK_FLOPS[chip.device_kind] == chip.peak_flops
    assert chip.hbm_bandwidth > chip.ici_bandwidth > chip.dcn_bandwidth
    ridge_point = chip.peak_flops / chip.hbm_bandwidth  # FLOPs per byte
    assert 100 < ridge_point < 600
