"""The training loop: stages, steps, and the log, evaluations and checkpoints between steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from vpe_jax import rng, sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.checkpoints.frozen import FrozenNetworks
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import Config, to_dict
from vpe_jax.contracts import Array, Batch, State, System
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.training import curves, encode, memory, report, resume
from vpe_jax.training.evaluations import Evaluations
from vpe_jax.training.feed import Feed
from vpe_jax.training.logging import RunLog
from vpe_jax.training.preemption import Preemption
from vpe_jax.training.profiler import Profiler
from vpe_jax.training.programs import StagePrograms, compile_stages
from vpe_jax.training.state import next_stage
from vpe_jax.training.workdir import locked


@dataclasses.dataclass(frozen=True)
class Run:
  """The constants of a run.

  Attributes:
    config: configuration of the run.
    system: system built from `config`.
    workdir: the run's folder.
    mesh: mesh of all devices.
    key: root random key.
    frozen: the frozen networks.
    data: the training split.
    digests: digests of the user's data.
    store: the checkpoints.
    origins: path of a parameter -> description of its source when this process started.
    first_stage: index of the stage in which this process started.
  """

  config: Config
  system: System
  workdir: epath.Path
  mesh: jax.sharding.Mesh
  key: Array
  frozen: FrozenNetworks
  data: Pipeline
  digests: Mapping[str, str]
  store: Store
  origins: dict[str, str]
  first_stage: int


@dataclasses.dataclass(frozen=True)
class Watchers:
  """Observers of a run: log, evaluators, profiler and preemption."""

  log: RunLog
  evaluations: Evaluations
  profiler: Profiler
  preemption: Preemption


def train(
  config: Config, system: System, workdir: str, allow_change: Sequence[str] = ()
) -> State | None:
  """Trains all stages of a run, or continues one that was interrupted.

  Args:
    config: configuration of the run.
    system: the system to train, built from the same config.
    workdir: output folder, local (`~` expands to the home folder) or gs://.
    allow_change: config fields that may differ from those the run was started with.

  Returns:
    The final state, or None if the run was preempted (and saved).

  Raises:
    UserError: the batch doesn't divide over the devices; the folder can't be written, is in use or
      contains another run; weights are missing or don't fit; or the gradient is repeatedly not
      finite.
    KeyboardInterrupt: Ctrl-C, after the run was saved, or before its first step.
  """
  mesh = sharding.make_mesh(config.mesh)
  for index, batch_size in enumerate(config.batch_size):
    sharding.check_divides(batch_size, mesh, config.optim_of(index).accumulate)
  _say(report.devices_text(mesh))
  folder = epath.Path(workdir).expanduser()
  with jax.set_mesh(mesh), contextlib.ExitStack() as cleanup:
    cleanup.enter_context(locked(folder))
    key = jax.device_put(rng.run_key(config.seed), sharding.replicated(mesh))
    store = Store(str(folder / FOLDER), config.checkpoint)
    cleanup.callback(store.close)  # Waits for the current save, however the run ends.
    preemption = cleanup.enter_context(Preemption())

    def accept(record: Mapping[str, Any]) -> None:
      resume.check_continues(record, str(folder))
      notes = resume.check_config(config, record['config'], str(folder), allow_change)
      notes += resume.check_data(digests, record.get('data', {}), str(folder), allow_change)
      for note in notes:
        _say(f'config change: {note}')

    with preemption.nothing_unsaved():
      # Frozen networks are loaded first: this reports errors at once, while the initialization of a
      # large model takes minutes.
      images = Pipeline.of(system)
      digests = images.digests()
      with memory.explained('the frozen networks and the state', config, 0):
        frozen = frozen_lib.load(system, mesh, config.mesh.strategy)
        state, origins = _start(config, system, frozen, str(folder), mesh, store, accept, key)
      data = encode.open_training_data(config, system, frozen, mesh, images)
    stage = int(state['stage'])
    run = Run(config, system, folder, mesh, key, frozen, data, digests, store, origins, stage)
    watchers = _watch(run, int(state['step']), cleanup, preemption)
    state = _run_stages(run, watchers, state)
  if preemption.interrupted:
    raise KeyboardInterrupt
  return state


def _start(
  config: Config,
  system: System,
  frozen: FrozenNetworks,
  workdir: str,
  mesh: jax.sharding.Mesh,
  store: Store,
  accept: Callable[[Mapping[str, Any]], None],
  key: Array,
) -> tuple[State, dict[str, str]]:
  """Restores the newest intact checkpoint or creates a new state; returns state and origins.

  `accept` raises a UserError for the record of a checkpoint with another config or other data.
  """

  def abstract_of(record: Mapping[str, Any]) -> State:
    accept(record)
    return resume.abstract_state(config, system, record['stage'], mesh)

  state = store.restore(abstract_of)
  if state is None:
    _say(f'run: new, writes to {workdir}')
    abstract = resume.abstract_state(config, system, 0, mesh)
    return resume.fresh_state(system, abstract, frozen.params, key)
  _say(f'run: resumes after step {int(state["step"])}, writes to {workdir}')
  origin = f'this run, step {int(state["step"])}'
  return state, dict.fromkeys(sharding.leaves_by_path(state['params']), origin)


def _watch(
  run: Run, resumed: int, cleanup: contextlib.ExitStack, preemption: Preemption
) -> Watchers:
  """Opens the log and the other observers of the run; `cleanup` closes them."""
  profiler = Profiler(run.config.log.profiled_steps, str(run.workdir / 'profile'))
  cleanup.callback(profiler.close)
  log = RunLog(run.workdir, run.config, run.system, resumed)
  cleanup.callback(log.close)
  return Watchers(
    log,
    Evaluations(run.config, run.system, run.frozen, run.mesh, run.workdir, log.show),
    profiler,
    preemption,
  )


def _run_stages(run: Run, watchers: Watchers, state: State) -> State | None:
  """Runs the remaining stages; each later stage starts with a new optimizer state and EMA."""
  programs: dict[int, StagePrograms] = {}
  while True:
    state = _run_stage(run, watchers, state, programs)
    if state is None:
      return None
    index = int(state['stage']) + 1
    if index == len(run.system.stages):
      break
    run.store.wait()  # The last save may still read buffers that `next_stage` deletes.
    abstract = resume.abstract_state(run.config, run.system, index, run.mesh)
    stage, optim = run.system.stages[index], run.config.optim_of(index)
    shardings = resume.shardings_of(abstract)
    state = next_stage(state, stage, optim, run.system.logical_axes, shardings)
  _write_curves(run)
  run.store.wait()
  return state


def _run_stage(
  run: Run, watchers: Watchers, state: State, programs: dict[int, StagePrograms]
) -> State | None:
  """Runs the remaining steps of the state's stage; returns None if the run was preempted.

  The first stage that runs adds the programs of all remaining stages to `programs`.
  """
  counters = {name: int(state[name]) for name in ('stage', 'step', 'stage_step')}
  index, total = counters['stage'], run.config.steps[counters['stage']]
  if counters['stage_step'] >= total:
    return state
  feed = _feed(run, int(state['examples_seen']), run.config.batch_size[index])
  stored_config = to_dict(run.config)
  try:
    with watchers.preemption.nothing_unsaved():
      batch = next(feed)
      if not programs:
        programs |= _compile(run, watchers, state)
      step = programs[index].step
      _report(run, programs[index], state, batch)
    watchers.log.resume_clock()
    while True:
      # 1. Dispatch the step without waiting for it, and log the previous one, after waiting for it.
      with memory.explained(f'step {counters["step"] + 1}', run.config, index, step.lowered):
        state, counters = _step(run, watchers, step.compiled, state, batch, counters)
      # 2. Run evaluators, whose numbers are added to this step's record.
      is_last = counters['stage_step'] == total
      _evaluate(run, watchers, state, programs[index], counters, is_last)
      # 3. Save a checkpoint, after the records of all its steps are on disk.
      is_leaving = watchers.preemption.reached()
      if is_last or is_leaving or run.store.due(counters['step']):
        watchers.log.flush()
        run.store.save(state, stored_config, is_last or is_leaving, run.digests)
        watchers.log.resume_clock()
      if is_leaving and not (is_last and index + 1 == len(run.system.stages)):
        run.store.wait()
        _say(f'preempted: saved step {counters["step"]}; the same command continues from there')
        return None
      if is_last:
        return state
      # 4. Get the next batch. The state counts its examples only after its step.
      batch, seconds = feed.get(watchers.log.is_running)
      watchers.log.waited(seconds)
  finally:
    feed.close()


def _step(
  run: Run,
  watchers: Watchers,
  step: jax.stages.Compiled,
  state: State,
  batch: Batch,
  counters: dict[str, int],
) -> tuple[State, dict[str, int]]:
  """Dispatches a step, and logs the previous one; returns the new state and its counters."""
  watchers.profiler.before(counters['step'] + 1)
  # The executable accepts only these shapes and shardings, so nothing is ever recompiled.
  with jax.transfer_guard('disallow'):
    state, metrics = step(state, run.frozen.params, batch, run.key)
  counters = counters | {name: counters[name] + 1 for name in ('step', 'stage_step')}
  watchers.profiler.after(counters['step'], metrics)
  watchers.log.push(counters, metrics)
  return state, counters


def _compile(run: Run, watchers: Watchers, state: State) -> dict[int, StagePrograms]:
  """Compiles the training steps and evaluators of the state's stage and of all later ones."""
  remaining = range(int(state['stage']), len(run.system.stages))
  stages = [index for index in remaining if run.config.steps[index]]
  names = ', '.join(run.system.stages[index].name for index in stages)
  _say(f'compiling the steps and evaluators of {names}')
  evaluators = lambda index: watchers.evaluations.programs(index, state)
  return compile_stages(run.config, run.system, run.frozen.params, run.mesh, stages, evaluators)


def _feed(run: Run, start: int, batch_size: int) -> Feed:
  batches = run.data.batches(start, batch_size, *sharding.host_part(run.mesh))
  return Feed(batches, lambda batch: sharding.put_batch(batch, run.mesh))


def _evaluate(
  run: Run,
  watchers: Watchers,
  state: State,
  programs: StagePrograms,
  counters: Mapping[str, int],
  is_last: bool,
) -> None:
  """Runs the evaluators that are due; reading counters of the state would wait for its step."""
  index, step = counters['stage'], counters['step']
  names = watchers.evaluations.due(index, step, is_last)
  if not names:
    return
  watchers.log.settle()  # Evaluation doesn't count as time of the step.
  listed, largest = ', '.join(names), programs.largest(names)
  with memory.explained(f'the evaluators {listed}', run.config, index, largest):
    watchers.log.add(watchers.evaluations.run(names, state, step))
  watchers.log.flush()  # The curves also show these numbers.
  watchers.log.resume_clock()
  _write_curves(run)


def _write_curves(run: Run) -> None:
  if jax.process_index() == 0:
    stages = run.system.stages
    curves.write(run.workdir, {name for stage in stages for name in stage.unweighted})


def _report(run: Run, programs: StagePrograms, state: State, batch: Batch) -> None:
  """Prints the start-up report of a stage."""
  index, stages = int(state['stage']), run.system.stages
  stage, optim = stages[index], run.config.optim_of(index)
  origins = report.origins_after(stages[run.first_stage : index], run.origins)
  sources = {name: network.source for name, network in run.system.frozen.items()}
  networks = report.Networks(run.frozen.params, sources)
  _say(report.stage_text(stage, run.config, index))
  _say(report.parameters_text(state['params'], networks, stage, optim, origins))
  if jax.process_index() == 0:
    report.write_parameters(run.workdir, state['params'])
  _say(report.memory_text(programs))
  first = run.data.prompt_at(int(state['examples_seen']))
  _say(report.sample_text(batch, first))


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)
