"""Compiles a program of a run for a topology and reports its memory, traffic and time bound."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax

from vpe_jax import sharding, systems
from vpe_jax.checkpoints import model as model_lib
from vpe_jax.compilation import hlo, program, roofline, topology, traffic
from vpe_jax.compilation.program import KINDS, SAMPLE, TRAIN
from vpe_jax.compilation.report import Report
from vpe_jax.compilation.topology import Topology
from vpe_jax.config import to_dict
from vpe_jax.contracts import System, UserError
from vpe_jax.training import memory

MIN_WARNED_BYTES = 2**20  # minimum bytes of an all-reduce for a warning
_DUMP_SUFFIX = 'after_optimizations.txt'


@dataclasses.dataclass(frozen=True)
class Request:
  """The program and topology to compile.

  Attributes:
    topology: such as `v5p:4x4x8`, `v5p-256` or `cpu:8`.
    slices: number of slices.
    mesh: axis -> size; overrides the config's mesh.
    program: `train` or `sample`.
    stage: name of the stage; None: the last one.
    images_per_chip: overrides the config's batch size; None: the config's.
    dtype: dtype of parameters and computation for sampling; None: as the generator loads them on
      such a device.
  """

  topology: str
  slices: int = 1
  mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
  program: str = TRAIN
  stage: str | None = None
  images_per_chip: int | None = None
  dtype: str | None = None

  def dtype_on(self, target: Topology) -> str:
    """Dtype of the parameters for sampling on a topology."""
    return self.dtype or model_lib.default_dtype('cpu' if target.chip is None else 'tpu')


def parse_mesh(text: str) -> dict[str, int]:
  """Parses `data=4,fsdp=64` to {'data': 4, 'fsdp': 64}.

  Raises:
    UserError: an axis is unknown or repeated, or a size is not a positive integer or -1.
  """
  sizes = {}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    if axis in sizes or axis not in sharding.AXES or not re.fullmatch(r'-1|[1-9]\d*', size):
      axes = ', '.join(sharding.AXES)
      raise UserError(f'--mesh={text}: name each of {axes} at most once, as in data=4,fsdp=64')
    sizes[axis] = int(size)
  return sizes


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program.

  Attributes:
    job: the program that was compiled.
    topology: its target.
    lowered: the lowered program and its properties.
    usage: memory on one device.
    text: optimized HLO; empty if compilation failed before it was available.
    seconds: compilation time.
  """

  job: program.Job
  topology: Topology
  lowered: program.Lowered
  usage: memory.Usage
  text: str
  seconds: float


def examine(config: Mapping[str, Any], request: Request) -> Report:
  """Compiles and reports a program of a run; the Python API of `vpe_jax.compile`.

  Args:
    config: configuration of the run, as nested dicts.
    request: the program and topology.

  Raises:
    UserError: the config or the request is invalid, or libtpu is missing.
  """
  return report(build(config, request))


def build(config: Mapping[str, Any], request: Request) -> Compiled:
  """Compiles a program of a run; see `examine`.

  Raises:
    UserError: as in `examine`.
  """
  if request.program not in KINDS:
    raise UserError(f'--program={request.program}: {" or ".join(KINDS)}')
  if request.dtype and request.program != SAMPLE:
    raise UserError(
      f'--dtype={request.dtype} is for --program=sample; the training step has config.dtype: set '
      f'--config.dtype={request.dtype}'
    )
  target = topology.parse(request.topology, request.slices)
  system = _with_overrides(systems.build(config), target, request)
  stage = program.index_of_stage(system, request.stage)
  devices = topology.devices(target)
  mesh = sharding.make_mesh(system.config.mesh, devices)
  images = system.config.batch_size[stage]
  started = time.perf_counter()
  job = program.Job(system, stage, request.program, images, mesh, request.dtype_on(target))
  lowered = program.lower(job)
  seconds = time.perf_counter() - started
  print(f'lowered in {seconds:.0f} s; compiling for {target.name}', flush=True)
  started = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    usage, text = _compile(lowered, target, pathlib.Path(folder))
  return Compiled(job, target, lowered, usage, text, time.perf_counter() - started)


def _with_overrides(system: System, target: Topology, request: Request) -> System:
  """Builds the system with the request's mesh and batch size."""
  values, config = to_dict(system.config), system.config
  values['mesh'] |= request.mesh
  if request.program == SAMPLE:
    values['dtype'] = request.dtype_on(target)
  if request.images_per_chip is not None:
    if request.images_per_chip < 1:
      raise UserError(f'--images_per_chip={request.images_per_chip}: it must be at least 1')
    values['batch_size'] = [request.images_per_chip * target.chips] * len(config.stages)
  return systems.build(values)


def _compile(
  lowered: program.Lowered, target: Topology, folder: pathlib.Path
) -> tuple[memory.Usage, str]:
  """Compiles a program; returns its memory and its HLO (from a dump if it can't be printed)."""
  options: dict[str, Any] = {}
  if target.chip is not None:
    options = {**memory.DUMP, 'xla_dump_to': str(folder)}
    options |= sharding.compiler_options('tpu')
  try:
    compiled = lowered.lowered.compile(compiler_options=options or None)
  except jax.errors.JaxRuntimeError as error:
    usage = memory.overflow(str(error), lowered.argument_bytes, folder)
    if usage is None:
      raise
    return usage, _read_dump(folder)
  usage = memory.usage(compiled, folder)
  try:
    return usage, compiled.as_text()
  # Some v5p programs can't be printed: the compiler's check of asynchronous updates fails.
  except jax.errors.JaxRuntimeError:
    return usage, _read_dump(folder)


def _read_dump(folder: pathlib.Path) -> str:
  """The optimized HLO in a dump; empty if compilation failed earlier."""
  files = sorted(folder.glob(f'*.{_DUMP_SUFFIX}'), key=lambda path: path.stat().st_size)
  return files[-1].read_text(encoding='utf-8') if files else ''


def report(compiled: Compiled) -> Report:
  """Reports the memory, traffic and time bound of a compiled program."""
  job, lowered, target = compiled.job, compiled.lowered, compiled.topology
  slice_of = [getattr(device, 'slice_index', 0) or 0 for device in job.mesh.devices.flat]
  work = traffic.work_of(hlo.parse(compiled.text), slice_of) if compiled.text else None
  devices = target.devices
  kernel_flops = lowered.kernel_flops if work and work.kernels else 0.0
  bound = None
  if work and target.chip:
    bound = roofline.bound(work, kernel_flops / devices, lowered.flops / devices, target.chip)
  return Report(
    config=f'{job.system.config.name}:{job.system.config.preset}',
    stage=job.stage.name,
    program=job.program,
    topology=target,
    mesh=dict(job.mesh.shape),
    settings=_settings(job),
    images=job.images,
    parameters=lowered.parameters,
    frozen_bytes=lowered.frozen_bytes,
    usage=compiled.usage,
    model_flops=lowered.flops,
    kernel_flops=kernel_flops,
    work=work,
    bound=bound,
    warnings=_warnings(job, lowered, work),
    compile_seconds=compiled.seconds,
    versions=_versions(),
  )


def _settings(job: program.Job) -> dict[str, Any]:
  config = job.system.config
  settings = {
    'strategy': config.mesh.strategy,
    'remat': config.remat,
    'accumulate': config.optim_of(job.stage_index).accumulate,
  }
  model = to_dict(config.model)
  return settings | {name: model[name] for name in ('logits_chunk',) if name in model}


def _warnings(
  job: program.Job, lowered: program.Lowered, work: traffic.Work | None
) -> tuple[str, ...]:
  if work is None:
    return ()
  warnings = []
  if work.unknown_loops:
    warnings.append(
      f'{len(work.unknown_loops)} loop(s) have a trip count that depends on data: their bodies are '
      'counted once'
    )
  if job.program == TRAIN:
    warnings += _reductions(lowered.trainable, work)
  return tuple(warnings)


def _reductions(trainable: Mapping[str, tuple[int, ...]], work: traffic.Work) -> list[str]:
  """A warning that names the leaves with the most all-reduced bytes; none if all are small."""
  leaves: dict[tuple[int, ...], str] = {}
  for path, shape in trainable.items():
    for dims in (shape, shape[1:]):  # the body of a scan reduces one layer
      leaves.setdefault(tuple(d for d in dims if d > 1), path)
  total, bytes_of = 0.0, {}
  for collective in work.collectives:
    if collective.kind != 'all-reduce' or collective.bytes < MIN_WARNED_BYTES:
      continue
    total += collective.bytes
    largest = max(collective.shapes, key=lambda shape: shape.elements)
    operation = collective.op_name or collective.name
    path = leaves.get(tuple(d for d in largest.dims if d > 1), operation)
    bytes_of[path] = bytes_of.get(path, 0.0) + collective.bytes
  if not bytes_of:
    return []
  worst = ', '.join(sorted(bytes_of, key=bytes_of.get, reverse=True)[:3])
  return [
    f'{total / 1e6:,.1f} MB per device move by all-reduce, twice the bytes of a reduce-scatter (of '
    f'gradients) or an all-gather (of weights): {worst}'
  ]


def _versions() -> dict[str, str]:
  versions = {}
  for name in ('vpe_jax', 'jax', 'jaxlib', 'libtpu'):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = 'none'
  return versions
