"""The machine under a run: unused accelerators, and the cache of compiled programs."""

from __future__ import annotations

import glob

import jax

from vpe_jax.data.storage import cache_dir

# What the kernel drivers of accelerators leave in /dev, and the extra that makes JAX see them.
DEVICE_FILES = {
  '/dev/accel*': ('TPU', 'tpu'),
  '/dev/vfio/[0-9]*': ('TPU', 'tpu'),
  '/dev/nvidia[0-9]*': ('NVIDIA', 'cuda'),
}


def idle_hardware() -> str | None:
  """A warning if there is an accelerator and JAX sees only the CPU, else None."""
  if jax.default_backend() != 'cpu':
    return None
  for pattern, (name, extra) in DEVICE_FILES.items():
    if glob.glob(pattern):
      return (
        f'WARNING: this machine has {name} hardware, but JAX sees only the CPU and will be far '
        f"slower. Install 'vpe_jax[{extra}]', and see that JAX_PLATFORMS isn't set to cpu."
      )
  return None


def compile_quickly() -> None:
  """Makes this process compile programs in less time, which then run slower."""
  jax.config.update('jax_disable_most_optimizations', True)


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk for later runs, unless JAX is configured to do so already."""
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
