"""Lowers the programs of a run, a training step or sampling, for devices that need not exist here.

Nothing is allocated: state, frozen networks and batch are shapes with shardings. The training step
is the one that `training.loop` runs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from vpe_jax import rng, sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.checkpoints import model as model_lib
from vpe_jax.config import did_you_mean
from vpe_jax.contracts import (
  Array,
  Batch,
  Generated,
  Params,
  Samples,
  Stage,
  System,
  UserError,
  require,
)
from vpe_jax.ops.flops import Flops, matrix_flops
from vpe_jax.training import programs, resume
from vpe_jax.training.model_flops import step_flops
from vpe_jax.training.state import split_trainable

TRAIN, SAMPLE = KINDS = ('train', 'sample')


@dataclasses.dataclass(frozen=True)
class Job:
  """The program to compile.

  Attributes:
    system: built from the run's config.
    stage_index: index of the stage.
    program: `train` (the training step of the stage) or `sample`.
    images: global batch size.
    mesh: mesh of the devices to compile for.
    dtype: dtype of the parameters for sampling; training has float32.
  """

  system: System
  stage_index: int
  program: str
  images: int
  mesh: jax.sharding.Mesh
  dtype: str = 'float32'

  @property
  def stage(self) -> Stage:
    """The stage with index `stage_index`."""
    return self.system.stages[self.stage_index]


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A lowered program and its properties.

  Attributes:
    lowered: the program to compile.
    parameters: number of parameters of the model without frozen networks: all, and trainable.
    trainable: path -> shape of each trainable leaf.
    frozen_bytes: bytes of the frozen networks on one device.
    argument_bytes: bytes of state and frozen networks on one device.
    flops: model FLOPs of the whole batch.
    kernel_flops: FLOPs of a training step in attention kernels, which HLO doesn't show; 0 for
      sampling.
  """

  lowered: jax.stages.Lowered
  parameters: tuple[int, int]
  trainable: dict[str, tuple[int, ...]]
  frozen_bytes: float
  argument_bytes: float
  flops: float
  kernel_flops: float


def index_of_stage(system: System, name: str | None) -> int:
  """Index of a stage; the last one by default.

  Raises:
    UserError: the run has no such stage.
  """
  names = [stage.name for stage in system.stages]
  if name is None:
    return len(names) - 1
  if name not in names:
    raise UserError(f'--stage={name}: the config has no such stage{did_you_mean(name, names)}')
  return names.index(name)


def lower(job: Job) -> Lowered:
  """Traces and lowers a program.

  Raises:
    UserError: the batch doesn't divide over the mesh, the state is not sharded enough, the frozen
      networks don't fit the model, or the system doesn't sample.
  """
  config, system = job.system.config, job.system
  if job.program == SAMPLE:
    require(system, Samples)
  accumulate = config.optim_of(job.stage_index).accumulate if job.program == TRAIN else 1
  sharding.check_divides(job.images, job.mesh, accumulate)
  if job.program == TRAIN:
    state = resume.abstract_state(config, system, job.stage_index, job.mesh)
  else:
    state = {'params': model_lib.abstract_params(system, job.mesh, job.dtype)}
  networks = frozen_lib.abstract_params(system)
  if job.program == SAMPLE:
    networks = {name: tree for name, tree in networks.items() if name in system.sampling_networks}
  if config.data.encode == 'online' and networks:
    frozen_lib.check_fits(system, networks)
  frozen = _with_shardings(
    networks, frozen_lib.shardings_of(networks, job.mesh, config.mesh.strategy)
  )
  key = rng.run_key(0)  # made before the mesh is set, whose devices may not exist here
  with jax.set_mesh(job.mesh):
    if job.program == TRAIN:
      lowered, flops = _lower_train(job, state, frozen, key)
    else:
      lowered, flops = _lower_sample(job, state, frozen)
  arguments = state if job.program == TRAIN else state['params']
  trainable, _ = split_trainable(state['params'], job.stage)
  shapes = {path: tuple(leaf.shape) for path, leaf in sharding.leaves_by_path(trainable).items()}
  count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  return Lowered(
    lowered,
    (count(state['params']), count(trainable)),
    shapes,
    _bytes_per_device(frozen),
    _bytes_per_device(frozen) + _bytes_per_device(arguments),
    flops.total,
    kernel_flops(flops, config.remat),
  )


def _bytes_per_device(tree: Any) -> float:
  """Bytes on one device of a tree of `jax.ShapeDtypeStruct` with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def kernel_flops(flops: Flops, remat: str) -> float:
  """FLOPs that attention kernels execute in a training step.

  A forward pass has two products. The backward pass has seven (three for the gradient of the
  queries, four for those of keys and values), or 3.5 forward passes. Full remat repeats the forward
  pass.
  """
  backward = 4.5 if remat == 'full' else 3.5
  passes = lambda kernel: kernel.calls + backward * kernel.trained
  return sum(passes(kernel) * kernel.flops() for kernel in flops.kernels)


def _lower_train(
  job: Job, state: Any, frozen: Params, key: Array
) -> tuple[jax.stages.Lowered, Flops]:
  system, index = job.system, job.stage_index
  lowered = programs.lower_step(system.config, system, index, state, frozen, job.mesh)
  return lowered, step_flops(system, job.stage, job.images, key)


def _lower_sample(job: Job, state: Any, frozen: Params) -> tuple[jax.stages.Lowered, Flops]:
  system = require(job.system, Samples)

  def sample(params: Params, frozen: Params, request: Batch, key: Array) -> Generated:
    return system.generate(system.prepare(params), frozen, request, key, system.config.sample)

  batch_sharding = sharding.batch_sharding(job.mesh)
  request = sharding.abstract(system.request_spec(job.images), batch_sharding)
  arguments = (state['params'], frozen, request, programs.abstract_key(job.mesh))
  lowered = jax.jit(sample, out_shardings=batch_sharding).lower(*arguments)
  return lowered, Flops(matrix_flops(sample, *arguments))


def _with_shardings(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )
