"""Accelerators: published specifications, detection of unused hardware, the compilation cache.

Sources of the TPU figures (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x, read in
2026):

* Interconnect: the pages give the bidirectional bandwidth (v5p 1,200, v6e 800, v5e 400 GB/s). A
  chip receives at most half of it. The page of v4 gives none; its links are those of arXiv
  2304.01433, and the page's bisection bandwidth of 24 TB/s agrees with them (512 links across
  16 x 16 x 16 chips).
* Data-center network: Google does not publish the share of a v4 chip; v5e's value is assumed.
* Memory: the "available HBM" in libtpu 0.0.52's out-of-memory error, slightly less than the pages
  give (16 GB for v5e and 32 GB for v6e, 32 GiB for v4). For v5p it is the page's 95 GiB, although
  libtpu would allow 95.7.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import pathlib
from typing import Any

import jax

from vpe_jax.storage import AnyPath, cache_dir, is_remote

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU.

  Attributes:
    name: short name, such as `v5p` in `v5p:4x4x8`.
    cloud_prefix: prefix of Google Cloud's slice names, such as `v5litepod`.
    device_kind: JAX's `device_kind`.
    cores: TensorCores per chip; the number in a Cloud name counts these.
    peak_flops: dense bf16 peak of a device, FLOP/s.
    hbm_bytes: memory of a device available to a program.
    hbm_bandwidth: bytes/s of a device.
    ici_bandwidth: bytes/s that a device receives over all its links within the slice.
    dcn_bandwidth: bytes/s that a device receives from other slices (its share of the network).
    grid_dimensions: number of dimensions of a slice's grid of chips.
    max_chips: largest number of chips in one slice.
    devices: JAX devices per chip.
  """

  name: str
  cloud_prefix: str
  device_kind: str
  cores: int
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float
  grid_dimensions: int
  max_chips: int
  devices: int = 1


CHIPS = {
  chip.name: chip
  for chip in (
    # 275 TFLOP/s; 32 GiB at 1,200 GB/s; 6 links of 50 GB/s; a job can use the whole pod of 4,096.
    # Network: assumed.
    Chip('v4', 'v4', 'TPU v4', 2, 275e12, 30.75 * GIB, 1200e9, 300e9, 3.125e9, 3, 4096),
    # 197 TFLOP/s; 16 GB at 819 GB/s; links 1,600 Gbit/s; network 6.4 Tbit/s for 256 chips.
    Chip('v5e', 'v5litepod', 'TPU v5 lite', 1, 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9, 2, 256),
    # 459 TFLOP/s; 95 GiB at 2,765 GB/s; 1,200 GB/s bidirectional; network 50 Gbit/s per chip; pod
    # of 8,960 chips, largest job 6,144.
    Chip('v5p', 'v5p', 'TPU v5', 2, 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9, 3, 6144),
    # 918 TFLOP/s; 32 GB at 1,640 GB/s (1,600 on newer versions of the page); 800 GB/s
    # bidirectional; network 25.6 Tbit/s for 256 chips.
    Chip('v6e', 'v6e', 'TPU v6 lite', 1, 918e12, 31.24 * GIB, 1640e9, 400e9, 12.5e9, 2, 256),
    # A chip of 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, 1,200 GB/s bidirectional and 100 Gbit/s of
    # network is two devices, which share all of these; pod of 9,216 chips.
    Chip(
      'tpu7x', 'tpu7x', 'TPU7x', 2, 1153.5e12, 96 * GIB, 3690e9, 300e9, 6.25e9, 3, 9216, devices=2
    ),
  )
}

# `device_kind` -> dense bf16 peak per device, FLOP/s. GPU figures are from NVIDIA's data sheets
# (A10G: AWS), with float32 accumulation.
PEAK_FLOPS = {
  **{chip.device_kind: chip.peak_flops for chip in CHIPS.values()},
  'TPU v5p': 459e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA B200': 2250e12,
  'NVIDIA GB200': 2500e12,
  'NVIDIA L4': 121e12,
  'NVIDIA A10G': 70e12,
  'NVIDIA GeForce RTX 3090': 71e12,
  'NVIDIA GeForce RTX 4090': 165.2e12,
  'NVIDIA GeForce RTX 5090': 209.5e12,
}

GOOGLE_VENDOR, NETWORK_CLASS = '0x1ae0', '0x020000'  # PCI vendor id; PCI class of network cards


def unused_accelerator_warning(root: str = '') -> str | None:
  """A warning if the machine has an accelerator but JAX sees only the CPU, else None.

  Args:
    root: root of the file system, for tests.
  """
  if jax.default_backend() != 'cpu':
    return None
  if _has_nvidia(root):
    name, extra = 'NVIDIA', 'cuda'
  elif _has_tpu(root):
    name, extra = 'TPU', 'tpu'
  else:
    return None
  return (
    f'WARNING: this machine has {name} hardware, but JAX sees only the CPU and will be far '
    f"slower. Install 'vpe_jax[{extra}]' and make sure that JAX_PLATFORMS isn't set to cpu."
  )


def skip_absent_tpu(root: str = '') -> None:
  """Selects the CPU platform if libtpu is installed (for vpe_jax.compile) but no TPU exists.

  Otherwise JAX would query libtpu for devices at every start, which prints warnings, and would
  profile with it, which can crash. Does nothing if JAX_PLATFORMS is set or an accelerator exists.

  Args:
    root: root of the file system, for tests.
  """
  chosen = os.environ.get('JAX_PLATFORMS') or jax.config.jax_platforms
  if chosen or _has_tpu(root) or _has_nvidia(root):
    return
  if importlib.util.find_spec('libtpu') is not None:
    jax.config.update('jax_platforms', 'cpu')


def _has_nvidia(root: str) -> bool:
  return bool(glob.glob(f'{root}/dev/nvidia[0-9]*'))


def _has_tpu(root: str) -> bool:
  # Newer TPUs appear under vfio, but so may other devices.
  by_vfio = glob.glob(f'{root}/dev/vfio/[0-9]*') and _has_google_chip(root)
  return bool(glob.glob(f'{root}/dev/accel[0-9]*') or by_vfio)


def _has_google_chip(root: str) -> bool:
  for vendor in pathlib.Path(f'{root}/sys/bus/pci/devices').glob('*/vendor'):
    kind = vendor.with_name('class')
    if vendor.read_text().strip() == GOOGLE_VENDOR and kind.read_text().strip() != NETWORK_CLASS:
      return True
  return False


def disable_optimizations() -> None:
  """Turns off most XLA optimizations: programs compile faster and run slower."""
  jax.config.update('jax_disable_most_optimizations', True)


def use_compilation_cache(folder: AnyPath | None = None) -> None:
  """Caches compiled programs for later calls, unless JAX already has a cache folder.

  All processes of a run read the cache, and JAX writes it from process 0 only. On hosts that share
  no file system, the other hosts compile again: an object store serves all of them.

  Args:
    folder: local or on an object store; None: the user's cache folder.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = cache_dir() / 'xla' if folder is None else folder
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  if is_remote(folder):  # XLA's own cache, of GPU autotuning, needs a local folder.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')


def machine() -> dict[str, Any]:
  """The devices and the number of CPU threads, which affect the last bits of a result.

  The threads matter only where a CPU is the device.
  """
  kinds = sorted({device.device_kind for device in jax.devices()})
  devices = f'{jax.device_count()} x {"+".join(kinds)}'
  # Only Linux reports the cores that a process may use.
  threads = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {'cpu_threads': threads, 'devices': devices}
