"""Compiles a program of a run for a topology and reads off what it needs and what bounds it."""

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
from vpe_jax.compilation import hlo, memory, program, roofline, topology, traffic
from vpe_jax.compilation.report import Report
from vpe_jax.compilation.topology import Topology
from vpe_jax.config import to_dict
from vpe_jax.contracts import System, UserError

LARGE = 2**20  # bytes from which an all-reduce is worth a warning
DUMPED = 'after_optimizations.txt'


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked.

  Attributes:
    topology: such as `v5p:4x4x8`, `v5p-256` or `cpu:8`.
    slices: how many slices of it.
    mesh: axis -> size, in the place of the config's.
    what: `train` or `sample`.
    stage: name of the stage; None: the last one.
    images_per_chip: in the place of the config's batch; None: the config's.
  """

  topology: str
  slices: int = 1
  mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
  what: str = program.TRAIN
  stage: str | None = None
  images_per_chip: int | None = None


def parse_mesh(text: str) -> dict[str, int]:
  """`data=4,fsdp=64` as {'data': 4, 'fsdp': 64}.

  Raises:
    UserError: a part is no size of an axis.
  """
  sizes = {}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    if axis in sizes or axis not in sharding.AXES or not re.fullmatch(r'-1|[1-9]\d*', size):
      listed = ', '.join(sharding.AXES)
      raise UserError(f'--mesh={text}: name sizes of {listed}, each once, as data=4,fsdp=64')
    sizes[axis] = int(size)
  return sizes


@dataclasses.dataclass(frozen=True)
class Built:
  """A compiled program.

  Attributes:
    job: what was asked for.
    place: the topology that it is for.
    lowered: the program before, and what was known of it then.
    usage: its memory on one chip.
    text: of the optimised program; empty where the compiler gave up before it had one.
    seconds: that compiling took.
  """

  job: program.Job
  place: Topology
  lowered: program.Lowered
  usage: memory.Usage
  text: str
  seconds: float


def examine(config: Mapping[str, Any], request: Request) -> Report:
  """Compiles what a config (plain nested dicts) describes; the command as a call.

  Raises:
    UserError: a mistake in the config or the request, or libtpu is missing; one line.
  """
  return report(build(config, request))


def build(config: Mapping[str, Any], request: Request) -> Built:
  """The compiled program that `examine` reads off.

  Raises:
    UserError: as `examine`.
  """
  if request.what not in program.KINDS:
    raise UserError(f'--what={request.what}: {" or ".join(program.KINDS)}')
  place = topology.parse(request.topology, request.slices)
  system = _configured(systems.build(config), place, request)
  stage = program.stage_index(system, request.stage)
  devices = topology.devices(place)
  mesh = sharding.make_mesh(system.config.mesh, devices)
  images = system.config.batch_size[stage]
  started = time.perf_counter()
  job = program.Job(system, stage, request.what, images, mesh)
  lowered = program.lower(job)
  print(f'lowered in {time.perf_counter() - started:.0f} s; compiling for {place.name}', flush=True)
  started = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    usage, text = _compile(lowered, place, pathlib.Path(folder))
  return Built(job, place, lowered, usage, text, time.perf_counter() - started)


def _configured(system: System, place: Topology, request: Request) -> System:
  """The system with the mesh and the batch that the request names."""
  values, config = to_dict(system.config), system.config
  values['mesh'] |= request.mesh
  if request.images_per_chip is not None:
    if request.images_per_chip < 1:
      raise UserError(f'--images_per_chip={request.images_per_chip}: at least 1')
    values['batch_size'] = [request.images_per_chip * place.chips] * len(config.stages)
  return systems.build(values)


def _compile(
  lowered: program.Lowered, place: Topology, folder: pathlib.Path
) -> tuple[memory.Usage, str]:
  """Compiles, and takes the text from the program or, where it can't be printed, from the dump."""
  options: dict[str, Any] = {}
  if place.chip is not None:
    options = {'xla_dump_to': str(folder), 'xla_dump_hlo_as_text': True}
    options |= sharding.compiler_options('tpu')
  try:
    compiled = lowered.lowered.compile(compiler_options=options or None)
  except jax.errors.JaxRuntimeError as error:
    usage = memory.overflow(str(error), lowered.argument_bytes, folder)
    if usage is None:
      raise
    return usage, _dumped(folder)
  usage = memory.usage(compiled, folder)
  try:
    return usage, compiled.as_text()
  # Some v5p programs can't be printed: a check of asynchronous updates fails inside the compiler.
  except jax.errors.JaxRuntimeError:
    return usage, _dumped(folder)


def _dumped(folder: pathlib.Path) -> str:
  """The text of the optimised program in a dump; empty if the compiler never came that far."""
  found = sorted(folder.glob(f'*.{DUMPED}'), key=lambda path: path.stat().st_size)
  return found[-1].read_text(encoding='utf-8') if found else ''


def report(built: Built) -> Report:
  """What a compiled program needs, and what bounds it."""
  job, lowered, place = built.job, built.lowered, built.place
  slice_of = [getattr(device, 'slice_index', 0) or 0 for device in job.mesh.devices.flat]
  work = traffic.work_of(hlo.parse(built.text), slice_of) if built.text else None
  chips = place.chips
  kernel_flops = lowered.kernel_flops if work and work.kernels else 0.0
  found = None
  if work and place.chip:
    found = roofline.bound(work, kernel_flops / chips, lowered.flops / chips, place.chip)
  return Report(
    config=f'{job.system.config.name}:{job.system.config.preset}',
    stage=job.stage_of_run.name,
    what=job.what,
    topology=place,
    mesh=dict(job.mesh.shape),
    settings=_settings(job),
    images=job.images,
    parameters=lowered.parameters,
    frozen_bytes=lowered.frozen_bytes,
    usage=built.usage,
    model_flops=lowered.flops,
    kernel_flops=kernel_flops,
    work=work,
    bound=found,
    warnings=_warnings(job, lowered, work),
    compile_seconds=built.seconds,
    versions=_versions(),
  )


def _settings(job: program.Job) -> dict[str, Any]:
  config = job.system.config
  found = {
    'strategy': config.mesh.strategy,
    'remat': config.remat,
    'accumulate': config.optim_of(job.stage).accumulate,
  }
  chunk = getattr(config.model, 'logits_chunk', None)
  return found if chunk is None else {**found, 'logits_chunk': chunk}


def _warnings(
  job: program.Job, lowered: program.Lowered, work: traffic.Work | None
) -> tuple[str, ...]:
  if work is None:
    return ()
  found = []
  if work.unknown_loops:
    found.append(
      f'{len(work.unknown_loops)} loop(s) run as often as the data says: their bodies count once'
    )
  if job.what == program.TRAIN:
    found += _reductions(lowered.trainable, work)
  return tuple(found)


def _reductions(trainable: Mapping[str, tuple[int, ...]], work: traffic.Work) -> list[str]:
  """One warning for all leaves that move whole by all-reduce, naming those with most bytes."""
  leaves: dict[tuple[int, ...], str] = {}
  for path, shape in trainable.items():
    for dims in (shape, shape[1:]):  # a scan's body reduces one layer
      leaves.setdefault(tuple(d for d in dims if d > 1), path)
  total, named = 0.0, {}
  for one in work.collectives:
    if one.kind != 'all-reduce' or one.bytes < LARGE:
      continue
    total += one.bytes
    largest = max(one.shapes, key=lambda shape: shape.elements)
    path = leaves.get(tuple(d for d in largest.dims if d > 1), one.op_name or one.name)
    named[path] = named.get(path, 0.0) + one.bytes
  if not named:
    return []
  worst = ', '.join(sorted(named, key=named.get, reverse=True)[:3])
  return [
    f'{total / 1e6:,.1f} MB a chip move by all-reduce, at twice the bytes of a reduce-scatter (of '
    f'gradients) or an all-gather (of weights): {worst}'
  ]


def _versions() -> dict[str, str]:
  found = {}
  for name in ('vpe_jax', 'jax', 'jaxlib', 'libtpu'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'none'
  return found
