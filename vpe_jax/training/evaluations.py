"""The evaluators of `config.evals`, run between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath

from vpe_jax.checkpoints.frozen import FrozenNetworks
from vpe_jax.config import Config
from vpe_jax.contracts import State, System
from vpe_jax.data.tokenizers.published import open_tokenizer
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation.evaluator import Evaluator, Subject
from vpe_jax.evaluation.report import Report
from vpe_jax.evaluation.sheets import layout
from vpe_jax.generator import Generator
from vpe_jax.sampling import images
from vpe_jax.training.state import weights


def build(system: System) -> dict[str, Evaluator]:
  """The evaluators that run in the training loop, by name; nothing is read yet.

  Raises:
    UserError: an unknown evaluator or option, or one that does not fit the system.
  """
  built = {}
  for name, options in system.config.evals.items():
    evaluators.class_of(name)  # A wrong name is an error even if the evaluator never runs.
    if options['every']:
      own = {key: value for key, value in options.items() if key != 'every'}
      built[name] = evaluators.build(name, own)
      evaluators.check_fits(name, built[name], system)
  return built


class Evaluations:
  """Evaluators that a run's config names, and when each is due."""

  def __init__(
    self,
    config: Config,
    system: System,
    frozen: FrozenNetworks,
    mesh: jax.sharding.Mesh,
    workdir: epath.Path,
    show: Callable[[str, np.ndarray, int], None] = lambda name, image, step: None,
  ):
    """Builds the evaluators; nothing is read yet.

    Args:
      config: configuration of the run.
      system: the system that trains.
      frozen: its frozen networks.
      mesh: mesh of the run.
      workdir: the run's folder; sheets go to its subfolders.
      show: is also called with each sheet: its name, uint8 [H, W, 3], and the step.

    Raises:
      UserError: see `build`.
    """
    self._config, self._system, self._frozen = config, system, frozen
    self._mesh, self._workdir, self._show = mesh, workdir, show
    self._generator: Generator | None = None
    self._evaluators = build(system)

  def due(self, stage: int, step: int, is_last: bool) -> list[str]:
    """Names of the evaluators to run after a step; those that sample need `Stage.samples`."""
    every = {name: options['every'] for name, options in self._config.evals.items()}
    return [name for name in self._in_stage(stage) if is_last or step % every[name] == 0]

  def programs(self, stage: int, state: State) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """Lowers the programs of all evaluators that run in a stage, for compilation ahead of time.

    Args:
      stage: index of the stage.
      state: a state of any stage: shapes and shardings of parameters are the same in all.

    Yields:
      Name of an evaluator, and one of its programs.
    """
    subject = self._subject(weights(state), stage, state['stage_step'])
    for name in self._in_stage(stage):
      for lowered in self._evaluators[name].programs(subject):
        yield name, lowered
    self._release()

  def run(self, names: list[str], state: State, step: int) -> dict[str, float]:
    """Runs evaluators on a state; writes their sheets, and returns numbers and their bounds."""
    index = int(state['stage'])
    subject = self._subject(weights(state), index, state['stage_step'])
    numbers: dict[str, float] = {}
    for name in names:
      evaluator = self._evaluators[name]
      report = evaluator.run(subject)
      numbers |= {**report.numbers, **report.bounds}
      self._write(name, evaluator, report, step)
      if subject.main:
        lines = [_line(name, report.numbers)] if report.numbers else report.lines
        print('\n'.join(lines), flush=True)
    self._release()
    return numbers

  def _release(self) -> None:
    """Drops the parameters of the generator: a copy, which would stay in memory between runs."""
    if self._generator is not None:
      self._generator.params = {}

  def _in_stage(self, stage: int) -> list[str]:
    """Names of the evaluators that run in a stage: those that sample need `Stage.samples`."""
    chosen = self._system.stages[stage]
    return [name for name, e in self._evaluators.items() if evaluators.fits_stage(e, chosen)]

  def _write(self, name: str, evaluator: Evaluator, report: Report, step: int) -> None:
    if jax.process_index() != 0:
      return
    for split, sheet in report.sheets.items():
      parts = [f'step_{step:07d}', *([name, split] if split else [])]
      path = self._workdir / evaluator.folder / f'{"-".join(parts)}.png'
      image = layout(sheet)
      images.save_png(image, path, overwrite=True)
      self._show(f'{name}/{split}'.rstrip('/'), np.asarray(image), step)

  def _subject(self, params: State, stage: int, stage_step: int | jax.Array) -> Subject:
    return Subject(
      self._system,
      params,
      stage,
      self._mesh,
      stage_step=stage_step,
      load_frozen=lambda: self._frozen,
      load_generator=self._generator_of(params),
    )

  def _generator_of(self, params: State) -> Callable[[], Generator]:
    """Returns a function that makes a generator; a run's generators share compiled programs."""

    def make() -> Generator:
      if self._generator is None:
        tokenizer = open_tokenizer(self._config.data.tokenizer)
        metadata = {'checkpoint': 'training', 'weights': str(self._workdir)}
        frozen, mesh = self._frozen.params, self._mesh
        self._generator = Generator(
          self._system, params, frozen, tokenizer, metadata, batch_size=32, mesh=mesh
        )
        return self._generator
      return self._generator.with_params(params)

    return make


def _line(name: str, numbers: Mapping[str, float]) -> str:
  return f'{name}: ' + ', '.join(f'{key} {value:.4g}' for key, value in numbers.items())
