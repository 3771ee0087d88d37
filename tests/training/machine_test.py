"""Tests of what the machine under a run is told about."""

import jax

from vpe_jax.training import machine


def test_warns_of_hardware_that_jax_does_not_use(tmp_path, monkeypatch):
  assert jax.default_backend() == 'cpu'
  (tmp_path / 'accel0').touch()
  monkeypatch.setattr(machine, 'DEVICE_FILES', {str(tmp_path / 'accel*'): ('TPU', 'tpu')})
  warning = machine.idle_hardware()
  assert 'TPU hardware' in warning and 'vpe_jax[tpu]' in warning
  monkeypatch.setattr(machine, 'DEVICE_FILES', {str(tmp_path / 'nvidia*'): ('NVIDIA', 'cuda')})
  assert machine.idle_hardware() is None


def test_compiling_quickly_turns_optimization_off():
  before = jax.config.read('jax_disable_most_optimizations')
  try:
    machine.compile_quickly()
    assert jax.config.read('jax_disable_most_optimizations')
  finally:
    jax.config.update('jax_disable_most_optimizations', before)


def test_compilation_cache_goes_to_the_cache_folder_unless_set(monkeypatch, tmp_path):
  before = jax.config.jax_compilation_cache_dir
  seconds = jax.config.jax_persistent_cache_min_compile_time_secs
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path))
  try:
    jax.config.update('jax_compilation_cache_dir', '/elsewhere')
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == '/elsewhere'
    jax.config.update('jax_compilation_cache_dir', None)
    machine.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'xla')
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)
