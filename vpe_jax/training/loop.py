"""The training loop: stages, steps, and everything that happens between two steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from vpe_jax import rng, sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.checkpoints.frozen import Frozen
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import Config, to_dict
from vpe_jax.contracts import Array, Batch, System
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.training import curves, encode, report, resume
from vpe_jax.training.evaluations import Evaluations
from vpe_jax.training.feed import Feed
from vpe_jax.training.logging import RunLog
from vpe_jax.training.preemption import Preemption
from vpe_jax.training.profiler import Profiler
from vpe_jax.training.state import State, next_stage
from vpe_jax.training.step import make_train_step
from vpe_jax.training.workdir import locked


@dataclasses.dataclass(frozen=True)
class Run:
  """The constants of a run, from its first step to its last.

  `origins` says for each parameter, by its path, where this process has it from; `began` is the
  stage in which it took up the run.
  """

  config: Config
  system: System
  workdir: epath.Path
  mesh: jax.sharding.Mesh
  key: Array
  frozen: Frozen
  data: Pipeline
  store: Store
  origins: dict[str, str]
  began: int


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
    config: the run.
    system: what trains, built from the same config.
    workdir: where everything is written: a local folder (`~` is the home folder) or gs://.
    allow_change: config fields that may differ from those the run was started with.

  Returns:
    The final state, or None if the machine is being taken away (the run is saved then).

  Raises:
    UserError: the batch doesn't divide over the devices, the folder can't be written, is in use or
      holds another run, weights are missing or don't fit, or the gradient stays non-finite.
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
    cleanup.callback(store.close)  # Waits for a save under way, however the run ends.
    # First what is quick and may not fit: a big model is initialised for minutes.
    frozen = frozen_lib.load(system, mesh, config.mesh.strategy)
    state, origins = _start(config, system, frozen, str(folder), mesh, store, allow_change, key)
    data = encode.open_training_data(config, system, frozen, mesh)
    began = int(state['stage'])
    run = Run(config, system, folder, mesh, key, frozen, data, store, origins, began)
    watchers = _watch(run, int(state['step']), cleanup)
    return _run_stages(run, watchers, state)


def _start(
  config: Config,
  system: System,
  frozen: Frozen,
  workdir: str,
  mesh: jax.sharding.Mesh,
  store: Store,
  allow_change: Sequence[str],
  key: Array,
) -> tuple[State, dict[str, str]]:
  """The state to go on from, the newest good checkpoint's or a new run's, and where it is from."""

  def abstract_of(meta: Mapping[str, Any]) -> State:
    for note in resume.check_config(config, meta['config'], workdir, allow_change):
      _say(f'config change: {note}')
    return resume.abstract_state(config, system, meta['stage'], mesh)

  state = store.restore(abstract_of)
  if state is None:
    _say(f'run: new, writes to {workdir}')
    abstract = resume.abstract_state(config, system, 0, mesh)
    return resume.fresh_state(system, abstract, frozen.params, key)
  _say(f'run: resumes after step {int(state["step"])}, writes to {workdir}')
  origin = f'this run, step {int(state["step"])}'
  return state, dict.fromkeys(sharding.leaves_by_path(state['params']), origin)


def _watch(run: Run, resumed: int, cleanup: contextlib.ExitStack) -> Watchers:
  """Opens the log and everything else that looks at the run; `cleanup` closes them."""
  profiler = Profiler(run.config.log.profile, str(run.workdir / 'profile'))
  cleanup.callback(profiler.close)
  log = RunLog(run.workdir, run.config, run.system, resumed)
  cleanup.callback(log.close)
  return Watchers(
    log,
    Evaluations(run.config, run.system, run.frozen, run.mesh, run.workdir),
    profiler,
    cleanup.enter_context(Preemption()),
  )


def _run_stages(run: Run, watchers: Watchers, state: State) -> State | None:
  """Runs what is left of each stage; between two stages the optimizer and the average restart."""
  while True:
    state = _run_stage(run, watchers, state)
    if state is None:
      return None
    index = int(state['stage']) + 1
    if index == len(run.system.stages):
      break
    run.store.wait()  # The last save may still read the buffers that are about to go.
    abstract = resume.abstract_state(run.config, run.system, index, run.mesh)
    given = (run.system.stages[index], run.config.optim_of(index), run.system.logical_axes)
    state = next_stage(state, *given, resume.shardings_of(abstract))
  if jax.process_index() == 0:
    curves.write(run.workdir)
  run.store.wait()
  return state


def _run_stage(run: Run, watchers: Watchers, state: State) -> State | None:
  """All steps that are left of the state's stage; None if the machine is being taken away."""
  counters = {name: int(state[name]) for name in ('stage', 'step', 'stage_step')}
  index, total = counters['stage'], run.config.steps[counters['stage']]
  if counters['stage_step'] >= total:
    return state
  feed = _feed(run, int(state['examples_seen']), run.config.batch_size[index])
  stored_config = to_dict(run.config)
  try:
    batch = next(feed)
    _say(f'stage {run.system.stages[index].name}: compiling its step')
    step = _compile(run, state, batch)
    _report(run, step, state, batch)
    watchers.log.resume_clock()
    while True:
      # 1. The step: dispatched, not awaited. It runs the one executable compiled above, which
      #    takes these shapes and shardings only: a recompilation is impossible.
      watchers.profiler.before(counters['step'] + 1)
      with jax.transfer_guard('disallow'):
        state, metrics = step(state, run.frozen.params, batch, run.key)
      counters = counters | {name: counters[name] + 1 for name in ('step', 'stage_step')}
      watchers.profiler.after(counters['step'], metrics)
      # 2. The log: writes the step before this one, which is done.
      watchers.log.push(counters, metrics)
      # 3. Evaluators: their numbers join this step's record.
      is_last = counters['stage_step'] == total
      _evaluate(run, watchers, state, counters['step'], is_last)
      # 4. The save: never before the records of all its steps are on disk.
      is_leaving = watchers.preemption.reached(counters['step'])
      if is_last or is_leaving or run.store.due(counters['step']):
        watchers.log.flush()
        run.store.save(state, stored_config, force=is_last or is_leaving)
        watchers.log.resume_clock()
      if is_leaving and not (is_last and index + 1 == len(run.system.stages)):
        run.store.wait()
        _say(f'preempted: saved step {counters["step"]}; the same command continues from there')
        return None
      if is_last:
        return state
      # 5. The next batch, after the save: the saved state never counts a batch it has not seen.
      batch = next(feed)
  finally:
    feed.close()


def _compile(run: Run, state: State, batch: Batch) -> jax.stages.Compiled:
  """The stage's step, compiled ahead of time for exactly this state and batch."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  index = int(state['stage'])
  stage, optim = run.system.stages[index], run.config.optim_of(index)
  step = make_train_step(run.system, stage, optim, shardings)
  return step.lower(state, run.frozen.params, batch, run.key).compile()


def _feed(run: Run, start: int, batch_size: int) -> Feed:
  batches = run.data.batches(start, batch_size, jax.process_index(), jax.process_count())
  return Feed(batches, lambda batch: sharding.put_batch(batch, run.mesh))


def _evaluate(run: Run, watchers: Watchers, state: State, step: int, is_last: bool) -> None:
  """Runs the evaluators that are due."""
  names = watchers.evaluations.due(int(state['stage']), step, is_last)
  if not names:
    return
  watchers.log.settle()  # The step's own time ends here.
  watchers.log.add(watchers.evaluations.run(names, state, step))
  watchers.log.flush()  # The curves show these numbers too.
  watchers.log.resume_clock()
  if jax.process_index() == 0:
    curves.write(run.workdir)


def _report(run: Run, step: jax.stages.Compiled, state: State, batch: Batch) -> None:
  """The start-up report of a stage."""
  index, stages = int(state['stage']), run.system.stages
  stage, optim = stages[index], run.config.optim_of(index)
  origins = report.origins_after(stages[run.began : index], run.origins)
  sources = {name: network.source for name, network in run.system.frozen.items()}
  networks = report.Networks(run.frozen.params, sources)
  _say(report.stage_text(stage, run.config, index))
  _say(report.parameters_text(state['params'], networks, stage, optim, origins))
  _say(report.memory_text(report.memory_of(step)))
  first = run.data.prompt(run.data.index_at(int(state['examples_seen'])))
  _say(report.sample_text(batch, first))


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)
