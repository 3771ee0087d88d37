"""Accelerators: published figures of each chip, detection of unused ones, the compilation cache.

Of TPUs, from the pages that Google publishes for each (docs.cloud.google.com/tpu/docs/v4, /v5e,
/v5p, /v6e and /tpu7x, read in 2026). The pages give the interconnect's bandwidth in both directions
together where they say bidirectional (v5p 1,200, v6e 800, v5e 400 GB/s); half of it is what a chip
receives at most. v4's page has none: its links are those of arXiv 2304.01433, which the page's
bisection of 24 TB/s bears out (512 links across 16 x 16 x 16 chips); its share of the hosts'
network is published nowhere, and v5e's is assumed. Memory is what libtpu 0.0.52 lets a program use,
a little less than the pages say (16 GB of v5e, 32 GB of v4 and v6e, 95 GiB of v5p, of which it
would let a program use 95.7): "available HBM" in its error of a program that is too large.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import pathlib

import jax

from vpe_jax.storage import cache_dir

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU.

  Attributes:
    name: as in `v5p:4x4x8`.
    cloud: what a slice's name begins with at Google Cloud, such as `v5litepod`.
    kind: JAX's `device_kind`.
    cores: TensorCores a chip, by which Cloud names of v4 and v5p count.
    flops: dense bf16 peak, FLOP/s.
    hbm_bytes: memory that a program can use.
    hbm_rate: bytes/s of the memory.
    ici_rate: bytes/s that one chip receives over all of its links in the slice.
    dcn_rate: bytes/s that one chip receives from other slices: its share of the hosts' network.
    dimensions: of the slice's grid of chips.
    largest: the most chips in one slice.
  """

  name: str
  cloud: str
  kind: str
  cores: int
  flops: float
  hbm_bytes: float
  hbm_rate: float
  ici_rate: float
  dcn_rate: float
  dimensions: int
  largest: int


CHIPS = {
  chip.name: chip
  for chip in (
    # 275 TFLOPs; 32 GiB at 1,200 GB/s; 6 links of 50 GB/s; pod of 4,096, of which all can be one
    # job. Network: assumed.
    Chip('v4', 'v4', 'TPU v4', 2, 275e12, 30.75 * GIB, 1200e9, 300e9, 3.125e9, 3, 4096),
    # 197 TFLOPs; 16 GB at 819 GB/s; 1,600 Gbit/s; network 6.4 Tbit/s for 256 chips.
    Chip('v5e', 'v5litepod', 'TPU v5 lite', 1, 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9, 2, 256),
    # 459 TFLOPs; 95 GiB at 2,765 GB/s; 1,200 GB/s both ways; network 50 Gbit/s a chip; pod of
    # 8,960 chips, largest job 6,144.
    Chip('v5p', 'v5p', 'TPU v5', 2, 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9, 3, 6144),
    # 918 TFLOPs; 32 GB at 1,640 GB/s (1,600 on newer versions of the page); 800 GB/s both ways;
    # network 25.6 Tbit/s for 256 chips.
    Chip('v6e', 'v6e', 'TPU v6 lite', 1, 918e12, 31.24 * GIB, 1640e9, 400e9, 12.5e9, 2, 256),
  )
}

# Dense bf16 peak per device in FLOP/s, keyed by `device_kind`; others from the makers' data sheets.
PEAK_FLOPS = {
  **{chip.kind: chip.flops for chip in CHIPS.values()},
  'TPU v5p': 459e12,
  'TPU7x': 2307e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}

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
