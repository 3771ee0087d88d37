"""Tests of accelerator detection and of JAX's compilation settings."""

import jax
import pytest

from vpe_jax import devices


def _make_device(root, path, **pci):
  (root / path).parent.mkdir(parents=True, exist_ok=True)
  (root / path).touch()
  for name, value in pci.items():
    chip = root / 'sys/bus/pci/devices/0000:00:04.0'
    chip.mkdir(parents=True, exist_ok=True)
    (chip / name).write_text(f'{value}\n')


@pytest.mark.parametrize(
  'path, pci, name',
  [
    ('dev/accel0', {}, 'vpe_jax[tpu]'),
    ('dev/nvidia0', {}, 'vpe_jax[cuda]'),
    ('dev/vfio/0', {'vendor': '0x1ae0', 'class': '0x120000'}, 'vpe_jax[tpu]'),
    ('dev/vfio/0', {'vendor': '0x1ae0', 'class': '0x020000'}, None),
    ('dev/vfio/0', {'vendor': '0x8086', 'class': '0x120000'}, None),
    ('dev/vfio/vfio', {}, None),
    ('dev/accel/accel0', {}, None),
    ('dev/null', {}, None),
  ],
)
def test_warns_of_an_accelerator_that_jax_does_not_use(tmp_path, path, pci, name):
  assert jax.default_backend() == 'cpu'
  _make_device(tmp_path, path, **pci)
  warning = devices.unused_accelerator_warning(str(tmp_path))
  assert (warning is None) if name is None else (name in warning)


@pytest.mark.parametrize(
  'path, chosen, installed, platforms',
  [
    ('dev/null', '', True, 'cpu'),
    ('dev/null', '', False, None),
    ('dev/null', 'tpu,cpu', True, None),
    ('dev/accel0', '', True, None),
    ('dev/nvidia0', '', True, None),
  ],
)
def test_libtpu_without_a_tpu_selects_the_cpu(
  monkeypatch, tmp_path, path, chosen, installed, platforms
):
  before, spec = jax.config.jax_platforms, object() if installed else None
  monkeypatch.setenv('JAX_PLATFORMS', chosen)
  monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: spec)
  _make_device(tmp_path, path)
  try:
    jax.config.update('jax_platforms', None)
    devices.skip_absent_tpu(str(tmp_path))
    assert jax.config.jax_platforms == platforms
  finally:
    jax.config.update('jax_platforms', before)


def test_disable_optimizations_sets_jax_config():
  before = jax.config.read('jax_disable_most_optimizations')
  try:
    devices.disable_optimizations()
    assert jax.config.read('jax_disable_most_optimizations')
  finally:
    jax.config.update('jax_disable_most_optimizations', before)


def test_compilation_cache_uses_the_cache_folder_unless_set(monkeypatch, tmp_path):
  before = jax.config.jax_compilation_cache_dir
  seconds = jax.config.jax_persistent_cache_min_compile_time_secs
  xla_caches = jax.config.jax_persistent_cache_enable_xla_caches
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path))
  try:
    jax.config.update('jax_compilation_cache_dir', '/elsewhere')
    devices.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == '/elsewhere'
    jax.config.update('jax_compilation_cache_dir', None)
    devices.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'xla')
    jax.config.update('jax_compilation_cache_dir', None)
    devices.use_compilation_cache('gs://bucket/run/cache')
    assert jax.config.jax_compilation_cache_dir == 'gs://bucket/run/cache'
    assert jax.config.jax_persistent_cache_enable_xla_caches == 'none'
  finally:
    jax.config.update('jax_persistent_cache_enable_xla_caches', xla_caches)
    jax.config.update('jax_compilation_cache_dir', before)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)
