"""The programs of a run, compiled before its first step: training steps and evaluators.

A program that doesn't compile or doesn't fit ends the run at its start, not after hours. JAX caches
an executable with its jitted function, so the later calls of evaluators compile nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax

from vpe_jax import rng, sharding
from vpe_jax.config import Config
from vpe_jax.contracts import Params, State, System, UserError
from vpe_jax.training import memory, resume
from vpe_jax.training.step import make_train_step

Lowered = jax.stages.Lowered


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    name: `step`, or the name of an evaluator.
    lowered: the program before compilation.
    compiled: the executable.
  """

  name: str
  lowered: Lowered
  compiled: jax.stages.Compiled


@dataclasses.dataclass(frozen=True)
class StagePrograms:
  """The programs of one stage.

  Attributes:
    step: the training step.
    evaluators: the programs of the evaluators that run in the stage.
  """

  step: Program
  evaluators: tuple[Program, ...]

  def usage(self) -> dict[str, float] | None:
    """Bytes on one device while each program runs, by name; None if the backend reports none.

    While an evaluator runs, state, frozen networks and a batch are in memory, too.
    """
    step = memory.usage(self.step.compiled)
    if step is None:
      return None
    bytes_of = {self.step.name: step.planned}
    for program in self.evaluators:
      usage = memory.usage(program.compiled)
      total = step.arguments + usage.outputs - usage.aliased + usage.temporary + usage.code
      bytes_of[program.name] = max(total, bytes_of.get(program.name, 0.0))
    return bytes_of

  def largest(self, names: Collection[str]) -> Lowered | None:
    """The program of some evaluators with the most temporary memory, before compilation."""
    programs = [program for program in self.evaluators if program.name in names]
    usages = [memory.usage(program.compiled) for program in programs]
    temporary = [usage.temporary if usage else 0.0 for usage in usages]
    return programs[temporary.index(max(temporary))].lowered if programs else None


def compile_stages(
  config: Config,
  system: System,
  frozen: Params,
  mesh: jax.sharding.Mesh,
  stages: Iterable[int],
  evaluators: Callable[[int], Iterator[tuple[str, Lowered]]],
) -> dict[int, StagePrograms]:
  """Compiles the training steps and evaluators of some stages.

  Args:
    config: configuration of the run.
    system: the system that trains.
    frozen: its frozen networks.
    mesh: mesh of the run.
    stages: indices of the stages.
    evaluators: yields name and lowered programs of the evaluators of a stage.

  Raises:
    UserError: a program doesn't fit in the memory of a device.
  """
  programs = {}
  for index in stages:
    state = resume.abstract_state(config, system, index, mesh)
    name = f'the step of stage {system.stages[index].name}'
    lowered = lower_step(config, system, index, state, frozen, mesh)
    step = Program('step', lowered, _compile(name, config, index, lowered))
    others = tuple(
      Program(name, lowered, _compile(f'evaluator {name}', config, index, lowered))
      for name, lowered in evaluators(index)
    )
    programs[index] = StagePrograms(step, others)
    _check_fits(programs[index], config, index)
  return programs


def lower_step(
  config: Config,
  system: System,
  stage: int,
  state: State,
  frozen: Params,
  mesh: jax.sharding.Mesh,
) -> Lowered:
  """Lowers the training step of a stage.

  Args:
    config: configuration of the run.
    system: the system that trains.
    stage: index of the stage.
    state: shapes and shardings of the state; see resume.abstract_state.
    frozen: frozen networks, as arrays or shapes with shardings.
    mesh: mesh of the step, whose devices need not exist here.
  """
  optim = config.optim_of(stage)
  step = make_train_step(system, system.stages[stage], optim, resume.shardings_of(state))
  spec = system.batch_spec(config.batch_size[stage]).batch(config.data.encode == 'cached')
  batch = sharding.abstract(spec, sharding.batch_sharding(mesh))
  return step.lower(state, frozen, batch, abstract_key(mesh))


def abstract_key(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
  """The root key of a run as a shape, replicated on the mesh."""
  return sharding.abstract(rng.abstract_key(), sharding.replicated(mesh))


def _compile(name: str, config: Config, stage: int, lowered: Lowered) -> Any:
  with memory.explained(name, config, stage, lowered):
    return lowered.compile()


def device_memory() -> float | None:
  """Bytes of a device that programs may use; None if the backend has no limit."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def _check_fits(programs: StagePrograms, config: Config, stage: int) -> None:
  """Compares the memory of programs with that of a device, if both are known.

  The compiler knows the memory of the device, but not that the state is in memory while an
  evaluator runs.
  """
  limit = device_memory()
  for name, needed in (programs.usage() or {}).items():
    if limit and needed > limit:
      lowered = programs.largest([name]) or programs.step.lowered
      need = f'{memory.size_text(needed)} are needed and a device has {memory.size_text(limit)}'
      buffers = memory.largest_buffers(lowered)
      raise UserError(memory.exhausted_text(name, need, buffers, config, stage))
