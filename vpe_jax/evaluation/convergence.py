"""Convergence curves: the numbers of evaluators at several checkpoints of one or more runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vpe_jax import storage
from vpe_jax.checkpoints import model as model_lib
from vpe_jax.checkpoints import weights as weights_io
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation import plots
from vpe_jax.evaluation.evaluator import Evaluator, Subject
from vpe_jax.evaluation.intervals import METHOD
from vpe_jax.evaluation.report import TRUE_DRAFTS, number
from vpe_jax.sampling import images

ALL = 'all'
Points = list[dict[str, Any]]  # `step` of each checkpoint, and the number as Figure.summary


@dataclasses.dataclass
class Run:
  """The results of one run; a JSON record.

  Attributes:
    options: evaluator -> options.
    settings: sampling settings and version, see Generator.describe.
    checkpoints: step -> fingerprint of the parameters.
    numbers: name of a number -> its points, in the order of steps.
  """

  options: dict[str, Any]
  settings: dict[str, str]
  checkpoints: dict[int, str] = dataclasses.field(default_factory=dict)
  numbers: dict[str, Points] = dataclasses.field(default_factory=dict)


def parse_steps(text: str | None) -> tuple[int, ...] | str | None:
  """Parses --step: None (the newest), ALL, or steps in ascending order.

  Raises:
    UserError: it is neither.
  """
  if text is None or text == ALL:
    return text
  try:
    steps = tuple(sorted({int(step) for step in text.split(',')}))
  except ValueError:
    steps = ()
  if not steps or steps[0] < 0:
    raise UserError(f'--step={text}: name a step, several (500,1000), or `{ALL}`')
  return steps


def choose_steps(workdir: str, requested: Sequence[int] | str) -> list[int]:
  """The requested steps of a run's checkpoints.

  Raises:
    UserError: the run has no checkpoints, or none of a requested step.
  """
  saved = weights_io.steps_of(workdir)
  if requested == ALL:
    return saved
  if missing := sorted(set(requested) - set(saved)):
    raise UserError(
      f'{workdir} has no checkpoint of step {", ".join(map(str, missing))}; steps: '
      f'{", ".join(map(str, saved))}'
    )
  return list(requested)


def checkpoints(
  subject: Subject, workdir: str, weights: str, steps: Iterable[int]
) -> Iterator[tuple[int, Subject]]:
  """Pairs of step and subject; programs are compiled, and frozen networks loaded, once.

  Args:
    subject: the run at any of its checkpoints.
    workdir: folder of the run.
    weights: see checkpoints.model.load.
    steps: steps of its checkpoints.
  """
  for step in steps:
    dtype, mesh = subject.system.config.dtype, subject.mesh
    subject = subject.at(model_lib.load(workdir, weights, step, dtype, mesh))
    yield step, subject


def evaluate(
  built: Mapping[str, Mapping[str, Evaluator]],
  runs: Mapping[str, Iterable[tuple[int, Subject]]],
  folder: str,
) -> None:
  """Evaluates all checkpoints; prints their numbers, and writes JSON and curves after each.

  Evaluators that sample images skip checkpoints of stages in which no renderer has trained.

  Args:
    built: run name -> evaluator name -> evaluator. The runs share options and settings.
    runs: run name -> (step, subject at this step).
    folder: output folder of convergence-<hash>.json and .png, whose name depends on runs, options
      and settings.

  Raises:
    UserError: a file can't be written.
  """
  results: dict[str, Run] = {}
  paths: list[str] = []
  for name, pairs in runs.items():
    for step, subject in pairs:
      description = dict(subject.description)
      checkpoint = description.pop('checkpoint')
      if name not in results:
        options = {key: dataclasses.asdict(value) for key, value in built[name].items()}
        results[name] = Run(options, description)
      result = results[name]
      result.checkpoints[step] = checkpoint
      lines = _add_numbers(result, built[name], step, subject)
      print('\n'.join([f'== {name}, step {step}', *lines]), flush=True)
      paths = _save(results, list(runs), folder)
  print('\n'.join(f'wrote {path}' for path in paths), flush=True)


def _add_numbers(
  result: Run, built: Mapping[str, Evaluator], step: int, subject: Subject
) -> list[str]:
  """Adds the numbers of a checkpoint; returns lines to print."""
  lines = []
  for name, evaluator in built.items():
    if not evaluators.fits_stage(evaluator, subject.stage):
      lines.append(f'  {name}: none; no images are sampled in stage {subject.stage.name}')
      continue
    report = evaluator.run(subject)
    if not report.figures:
      lines += report.lines
    for key, figure in report.figures.items():
      result.numbers.setdefault(key, []).append({'step': step, **figure.summary()})
      lines.append(f'  {key:48}{number(figure, places=4)}')
  return lines


def make_panels(results: Mapping[str, Run]) -> list[plots.Panel]:
  """A panel for each number, with a curve for each run; values that are not finite are left out.

  Numbers of images from ground-truth drafts are in the panel of the model's own drafts.
  """
  curves: dict[str, list[plots.Curve]] = {}
  for run_name, result in results.items():
    for name, points in result.numbers.items():
      is_true_drafts = f'/{TRUE_DRAFTS}/' in name
      title = name.replace(f'/{TRUE_DRAFTS}/', '/').replace('/own/', '/')
      suffix = ', ground-truth drafts' if is_true_drafts else ''
      band = tuple((p['step'], *p['interval95']) for p in points if p['interval95'])
      values = [(p['step'], p['value']) for p in points if p['value'] is not None]
      if values:
        curves.setdefault(title, []).append(plots.Curve(values, f'{run_name}{suffix}', band))
  return [plots.Panel(title, tuple(own)) for title, own in curves.items()]


def _save(results: Mapping[str, Run], names: Sequence[str], folder: str) -> list[str]:
  """Writes JSON and curves; returns their paths."""
  first = results[names[0]]
  key = json.dumps([names, first.options, first.settings], sort_keys=True)
  digest = hashlib.sha256(key.encode()).hexdigest()[:8]
  path = storage.resolve(folder) / f'convergence-{digest}.json'
  record = {
    'intervals': METHOD,
    'runs': {name: dataclasses.asdict(result) for name, result in results.items()},
  }
  with storage.writing(path):
    storage.write_atomic(path, json.dumps(record, indent=1).encode())
  written = [str(path)]
  if panels := make_panels(results):
    written.append(str(path.with_suffix('.png')))
    images.save_png(plots.render(panels), written[-1], overwrite=True)
  return written
