"""The report of `python -m vpe_jax.compile`, as text and as a dict for JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from vpe_jax import storage
from vpe_jax.compilation.roofline import Bound
from vpe_jax.compilation.topology import Topology
from vpe_jax.compilation.traffic import Work
from vpe_jax.training.memory import Usage

FIT = 0.9  # fraction of HBM that a program may use; the runtime needs the rest
_KNOBS = {
  'remat': '--config.remat=full (currently {remat})',
  'accumulate': '--config.optim.accumulate={accumulate} (microbatches) or more',
  'images': '--images_per_chip={images} or fewer',
  'chunk': '--config.model.logits_chunk=64 (computes logits of few tokens at a time)',
  'mesh': 'more chips, or --mesh with a larger tensor axis (--config.mesh.strategy=fsdp_tensor)',
}


@dataclasses.dataclass(frozen=True)
class Report:
  """One program on one topology.

  Attributes:
    config: name of the config, a colon, and its preset (for vpe_jax.compile, all that follows the
      colon of --config).
    stage: name of the stage.
    program: `train` or `sample`.
    topology: target of the compilation.
    mesh: axis -> size.
    settings: fields of the config on which memory depends: `remat`, `accumulate`, `strategy`, and
      `logits_chunk` if the model has it.
    images: global batch size.
    parameters: number of parameters of the model: all, and trainable in this stage.
    frozen_bytes: bytes of the frozen networks on one device.
    usage: memory on one device.
    model_flops: model FLOPs of one training step, or of sampling one batch, on all chips
      (Lowered.flops).
    kernel_flops: those in custom kernels, which HLO doesn't show.
    work: FLOPs and traffic; None if compilation failed before there was optimized HLO.
    bound: bound on the time of a step, or of sampling a batch; None without `work` or the chip's
      specifications.
    warnings: one line each.
    compile_seconds: compilation time on this machine.
    versions: library -> version.
  """

  config: str
  stage: str
  program: str
  topology: Topology
  mesh: dict[str, int]
  settings: dict[str, Any]
  images: int
  parameters: tuple[int, int]
  frozen_bytes: float
  usage: Usage
  model_flops: float
  kernel_flops: float
  work: Work | None
  bound: Bound | None
  warnings: tuple[str, ...]
  compile_seconds: float
  versions: dict[str, str]

  @property
  def hbm_bytes(self) -> float | None:
    """HBM of a device; None for virtual devices."""
    return self.usage.limit or (self.topology.chip and self.topology.chip.hbm_bytes)

  @property
  def hbm_fraction(self) -> float | None:
    """Fraction of HBM in use at the peak."""
    return self.usage.peak / self.hbm_bytes if self.hbm_bytes else None

  @property
  def fits(self) -> bool:
    """Whether the program fits in HBM, with a reserve for the runtime."""
    if not self.usage.fits or self.hbm_bytes is None:
      return self.usage.fits
    return max(self.usage.peak, self.usage.planned) <= FIT * self.hbm_bytes

  def save(self, path: str) -> None:
    """Writes `as_dict` as JSON to a local or gs:// path, atomically.

    Raises:
      UserError: the file can't be written.
    """
    with storage.writing(path):
      content = json.dumps(self.as_dict(), indent=2) + '\n'
      storage.write_atomic(storage.resolve(path), content.encode())

  def as_dict(self) -> dict[str, Any]:
    """Values for JSON; None if unknown. Bytes are per device, FLOPs are of all chips."""
    usage, work, bound = self.usage, self.work, self.bound
    chips = self.topology.chips
    return {
      'config': self.config,
      'stage': self.stage,
      'program': self.program,
      'topology': self.topology.name,
      'cloud_name': self.topology.cloud_name,
      'slices': self.topology.slices,
      'chips': chips,
      'devices': self.topology.devices,
      'mesh': self.mesh,
      **self.settings,
      'global_batch': self.images,
      'images_per_step': self.images,
      'images_per_chip': self.images / chips,
      'parameters': self.parameters[0],
      'trainable_parameters': self.parameters[1],
      'fits': self.fits,
      'peak_bytes_per_device': usage.peak,
      'hbm_bytes_per_device': self.hbm_bytes,
      'hbm_fraction': self.hbm_fraction,
      'planned_bytes_per_device': usage.planned,
      'argument_bytes_per_device': usage.arguments,
      'output_bytes_per_device': usage.outputs,
      'aliased_bytes_per_device': usage.aliased,
      'temporary_bytes_per_device': usage.temporary,
      'code_bytes_per_device': usage.code,
      'frozen_bytes_per_device': self.frozen_bytes,
      'largest_buffers': [dataclasses.asdict(buffer) for buffer in usage.buffers],
      'model_flops_per_step': self.model_flops,
      'hlo_flops_per_step': work and work.flops * self.topology.devices + self.kernel_flops,
      'kernel_flops_per_step': self.kernel_flops,
      'hbm_traffic_bytes': work and work.hbm_bytes,
      'hbm_movers': work and [{'where': op, 'bytes': n} for op, n in work.largest_traffic],
      'collective_bytes': work and work.collective_bytes(),
      'dcn_bytes': work and sum(collective.dcn_bytes for collective in work.collectives),
      'bound_s': bound and bound.seconds,
      'step_time_bound_s': bound and bound.step_time,
      'mfu_bound': bound and bound.mfu,
      'bound_by': bound and bound.resource,
      'warnings': list(self.warnings),
      'compile_seconds': self.compile_seconds,
      'versions': self.versions,
    }

  def text(self) -> str:
    """The report as lines of text."""
    lines = [
      f'{self.config}, {self._program_text()}, on {self._topology_text()}',
      f'mesh: {_mesh(self.mesh)}, strategy {self.settings["strategy"]}; remat '
      f'{self.settings["remat"]}, {self.settings["accumulate"]} microbatch(es)',
      f'batch: {self.images:,} images, {self.images / self.topology.chips:g} per chip',
      f'parameters: {self.parameters[0] / 1e6:,.1f}M, trainable '
      f'{self.parameters[1] / 1e6:,.1f}M; frozen networks {_gb(self.frozen_bytes)} per device',
      *self._memory_lines(),
      *self._work_lines(),
      *(f'warning: {warning}' for warning in self.warnings),
    ]
    return '\n'.join(lines)

  @property
  def _unit(self) -> str:
    """One execution of the program."""
    return 'step' if self.program == 'train' else 'batch'

  def _program_text(self) -> str:
    return f'training step of stage {self.stage}' if self.program == 'train' else 'sampling'

  def _topology_text(self) -> str:
    cloud = self.topology.cloud_name
    return f'{self.topology.name}{f" ({cloud})" if cloud else ""}: {self.topology.chips} chips'

  def _memory_lines(self) -> list[str]:
    usage = self.usage
    share = f', {self.hbm_fraction:.1%} of {_gb(self.hbm_bytes)} HBM' if self.hbm_bytes else ''
    if usage.fits:
      lines = [
        f'memory per device: peak {_gb(usage.peak)}{share} (arguments {_gb(usage.arguments)}, '
        f'temporaries {_gb(usage.temporary)}, total {_gb(usage.planned)})'
      ]
    else:
      lines = [f'memory per device: the program needs {_gb(usage.peak)}{share}']
    if self.fits:
      return lines
    lines.append(f'DOES NOT FIT (within {FIT:.0%} of HBM). Largest buffers:')
    lines += [f'  {_gb(buffer.bytes):>10}  {buffer.holds}' for buffer in usage.buffers]
    return [*lines, 'to reduce memory:', *(f'  {knob}' for knob in self.knobs())]

  def knobs(self) -> list[str]:
    """Settings that would reduce memory."""
    settings, chips = self.settings, self.topology.chips
    names = ['images', 'mesh'] if self.program == 'sample' else list(_KNOBS)
    if settings['remat'] == 'full':
      names = [name for name in names if name != 'remat']
    if settings.get('logits_chunk', 1):
      names = [name for name in names if name != 'chunk']
    if self.images <= chips:
      names.remove('images')
    values = {
      'remat': settings['remat'],
      'accumulate': 2 * settings['accumulate'],
      'images': max(1, self.images // chips // 2),
    }
    return [_KNOBS[name].format(**values) for name in names]

  def _work_lines(self) -> list[str]:
    work, bound, devices = self.work, self.bound, self.topology.devices
    if work is None:
      return []
    received = ', '.join(f'{kind} {_gb(n)}' for kind, n in sorted(work.collective_bytes().items()))
    executed = work.flops * devices + self.kernel_flops
    lines = [
      f'FLOPs per {self._unit}: model {self.model_flops:.4g}, compiled program {executed:.4g} '
      f'({executed / max(self.model_flops, 1.0):.2f} times, including recomputation)',
      f'per device: receives {received or "nothing"}; HBM traffic {_gb(work.hbm_bytes)}',
    ]
    if bound is None:
      return [*lines, "bound: none, because this chip's specifications are unknown"]
    times = ', '.join(f'{name} {_seconds(s)}' for name, s in bound.seconds.items() if s)
    if bound.resource == 'hbm':
      lines.append('largest HBM traffic:')
      lines += [f'  {_gb(count):>10}  {op}' for op, count in work.largest_traffic]
    return [
      *lines,
      f'bound: a {self._unit} takes at least {_seconds(bound.step_time)} '
      f'(limited by {bound.resource}), '
      f'MFU at most {bound.mfu:.1%}, {self.images / bound.step_time:,.0f} images/s; '
      f'per resource: {times}',
    ]


def _mesh(sizes: dict[str, int]) -> str:
  return ' x '.join(f'{name} {size}' for name, size in sizes.items())


def _gb(count: float) -> str:
  for unit, size in (('GB', 1e9), ('MB', 1e6)):
    if count >= size:
      return f'{count / size:,.2f} {unit}'
  return f'{count / 1e3:,.1f} kB'


def _seconds(count: float) -> str:
  return f'{count:.3f} s' if count >= 0.1 else f'{count * 1e3:.3g} ms'
