"""Names of TPU slices, and their devices as compilation targets.

`v5p:4x4x8` gives the grid of chips. Cloud names (`v5p-256`, `v4-128`, `v5litepod-256`, `v6e-256`)
give the size, in TensorCores for v4, v5p and tpu7x and in chips for v5e and v6e. Both forms are
accepted, and reports contain both. `cpu:8` means eight virtual devices of this machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from vpe_jax.config import did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.devices import CHIPS, Chip

CPU = 'cpu'
# Number of dimensions -> grids of the usual slices, smallest first (pages cited in devices.py).
_GRIDS = {
  2: ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  3: (
    '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16',
    '16x16x16', '16x16x24', '16x24x24',
  ),
}  # fmt: skip
_MAX_VIRTUAL = 4096  # virtual devices; each has its own threads
# Read by libtpu when it is loaded: don't query TPU metadata, and allow other processes to load it.
_LIBTPU = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more slices of equal shape.

  Attributes:
    chip: kind of chip; None for virtual devices of this machine.
    grid: chips along each dimension of a slice.
    slices: number of slices.
  """

  chip: Chip | None
  grid: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    """Number of chips in all slices."""
    return math.prod(self.grid) * self.slices

  @property
  def devices(self) -> int:
    """Number of JAX devices in all slices."""
    return self.chips * (self.chip.devices if self.chip else 1)

  @property
  def name(self) -> str:
    """Name such as `v5p:4x4x8` or `2 x v5e:4x4`."""
    grid = 'x'.join(map(str, self.grid))
    slice_name = f'{self.chip.name if self.chip else CPU}:{grid}'
    return slice_name if self.slices == 1 else f'{self.slices} x {slice_name}'

  @property
  def cloud_name(self) -> str | None:
    """Cloud name of one slice, such as `v5p-256`; None for virtual devices."""
    if self.chip is None:
      return None
    return f'{self.chip.cloud_prefix}-{math.prod(self.grid) * self.chip.cores}'


def parse(text: str, slices: int = 1) -> Topology:
  """Parses the name of a slice.

  Raises:
    UserError: the name has none of these forms, the chip is unknown, or no such slice exists.
  """
  if slices < 1:
    raise UserError(f'--slices={slices}: it must be at least 1')
  if text.startswith(f'{CPU}:'):
    count = text.removeprefix(f'{CPU}:')
    if slices > 1 or not re.fullmatch('[0-9]{1,9}', count) or not 0 < int(count) <= _MAX_VIRTUAL:
      raise UserError(
        f'--topology={text}: virtual devices are from 1 to {_MAX_VIRTUAL:,}, in a single slice'
      )
    return Topology(None, (int(count),))
  if match := re.fullmatch(r'(\w+):([0-9]+(?:x[0-9]+)*)', text):
    chip = _chip(match.group(1), text)
    return _checked(Topology(chip, tuple(map(int, match.group(2).split('x'))), slices), text)
  if match := re.fullmatch(r'(\w+)-([0-9]+)', text):
    chip = _chip(match.group(1), text)
    grids = [tuple(map(int, grid.split('x'))) for grid in _GRIDS[chip.grid_dimensions]]
    for grid in grids:
      if math.prod(grid) * chip.cores == int(match.group(2)):
        return _checked(Topology(chip, grid, slices), text)
    sizes = [size for size in map(math.prod, grids) if size <= chip.max_chips]
    known = ', '.join(f'{chip.cloud_prefix}-{size * chip.cores}' for size in sizes)
    raise UserError(f'--topology={text}: no such slice; use one of {known}, or {chip.name}:GRID')
  raise UserError(
    f'--topology={text}: give a grid of chips such as v5p:4x4x8, a Google Cloud name such as '
    'v5p-256, or cpu:8'
  )


def devices(topology: Topology) -> list[jax.Device]:
  """Abstract devices to compile for, slice by slice.

  Raises:
    UserError: libtpu is missing or doesn't support the topology, or this process has too few
      virtual CPU devices.
  """
  if topology.chip is None:
    return _virtual(topology.chips)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError('compiling for TPU needs libtpu, on any machine: pip install libtpu')
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  options = {'num_slices': topology.slices} if topology.slices > 1 else {}
  if topology.chip.name == 'v4':  # The default is two devices per chip.
    options['chip_config_name'] = 'megacore'
  grid = 'x'.join(map(str, topology.grid))
  try:
    devices = topologies.get_topology_desc(f'{topology.chip.name}:{grid}', 'tpu', **options).devices
  except Exception as error:  # libtpu has no error type of its own.
    reason = (str(error).splitlines() or [''])[0]
    raise UserError(f'libtpu refuses --topology={topology.name}: {reason}') from error
  chips = {(getattr(d, 'slice_index', 0) or 0, tuple(d.coords)) for d in devices}
  if (len(chips), len(devices)) != (topology.chips, topology.devices):
    raise UserError(
      f'libtpu gives {len(devices)} devices on {len(chips)} chips for --topology={topology.name}, '
      f'which has {topology.devices} on {topology.chips}: install the newest libtpu'
    )
  return list(devices)


def _virtual(count: int) -> list[jax.Device]:
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise UserError(
      f'--topology=cpu:{count}: this process has {len(devices)} virtual devices; set '
      f'XLA_FLAGS=--xla_force_host_platform_device_count={count}'
    )
  return devices[:count]


def _chip(name: str, text: str) -> Chip:
  for chip in CHIPS.values():
    if name in (chip.name, chip.cloud_prefix):
      return chip
  raise UserError(f"--topology={text}: unknown chip '{name}'{did_you_mean(name, [*CHIPS, CPU])}")


def _checked(topology: Topology, text: str) -> Topology:
  chip, grid = topology.chip, topology.grid
  if len(grid) != chip.grid_dimensions or min(grid) < 1:
    example = _GRIDS[chip.grid_dimensions][3]
    raise UserError(
      f'--topology={text}: a slice of {chip.name} has {chip.grid_dimensions} dimensions, such as '
      f'{chip.name}:{example}'
    )
  fits = lambda grid: math.prod(map(int, grid.split('x'))) <= chip.max_chips
  widest = list(filter(fits, _GRIDS[chip.grid_dimensions]))[-1]
  limits = sorted(map(int, widest.split('x')))
  if math.prod(grid) > chip.max_chips or any(a > b for a, b in zip(sorted(grid), limits)):
    raise UserError(
      f'--topology={text}: the largest slice of {chip.name} is {widest} ({chip.max_chips:,} '
      'chips); for several slices set --slices=N'
    )
  return topology
