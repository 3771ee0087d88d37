"""The machine under a run: unused accelerators, and the cache of compiled programs."""

from __future__ import annotations

import glob
import importlib.util
import os
import pathlib

import jax

from vpe_jax.data.storage import cache_dir

GOOGLE, NETWORK = '0x1ae0', '0x020000'  # PCI vendor, and the class of its network cards


def idle_hardware(root: str = '') -> str | None:
  """A warning if there is an accelerator and JAX sees only the CPU, else None.

  Args:
    root: of the file system, for tests.
  """
  if jax.default_backend() != 'cpu':
    return None
  if glob.glob(f'{root}/dev/nvidia[0-9]*'):
    name, extra = 'NVIDIA', 'cuda'
  elif _has_tpu(root):
    name, extra = 'TPU', 'tpu'
  else:
    return None
  return (
    f'WARNING: this machine has {name} hardware, but JAX sees only the CPU and will be far '
    f"slower. Install 'vpe_jax[{extra}]', and see that JAX_PLATFORMS isn't set to cpu."
  )


def leave_out_absent_tpu(root: str = '') -> None:
  """Keeps JAX from a TPU that isn't there, where its compiler is installed (for vpe_jax.compile).

  Left to itself JAX asks the compiler for devices at every start, which prints what it misses, and
  profiles with it, which can crash. Does nothing where JAX_PLATFORMS is set or there is hardware.

  Args:
    root: of the file system, for tests.
  """
  chosen = os.environ.get('JAX_PLATFORMS') or jax.config.jax_platforms
  if chosen or _has_tpu(root) or glob.glob(f'{root}/dev/nvidia[0-9]*'):
    return
  if importlib.util.find_spec('libtpu') is not None:
    jax.config.update('jax_platforms', 'cpu')


def _has_tpu(root: str) -> bool:
  # Newer TPUs are handed over through vfio, as other devices may be.
  by_vfio = glob.glob(f'{root}/dev/vfio/[0-9]*') and _has_google_chip(root)
  return bool(glob.glob(f'{root}/dev/accel[0-9]*') or by_vfio)


def _has_google_chip(root: str) -> bool:
  for vendor in pathlib.Path(f'{root}/sys/bus/pci/devices').glob('*/vendor'):
    kind = vendor.with_name('class')
    if vendor.read_text().strip() == GOOGLE and kind.read_text().strip() != NETWORK:
      return True
  return False


def compile_quickly() -> None:
  """Makes this process compile programs in less time, which then run slower."""
  jax.config.update('jax_disable_most_optimizations', True)


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk for later runs, unless JAX is configured to do so already."""
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
