"""Runs evaluators on finished runs; prints tables and writes reports and sheets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vpe_jax import storage
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation.evaluator import Evaluator, Subject
from vpe_jax.evaluation.intervals import Figure
from vpe_jax.evaluation.report import Report, Sheet, aligned, number, summaries
from vpe_jax.evaluation.sheets import combine, layout
from vpe_jax.sampling import images


def select(
  built: Mapping[str, Evaluator], subject: Subject, options: Mapping[str, Any]
) -> dict[str, Evaluator]:
  """The evaluators for a model: the named ones, or the first one for its kind of prompts.

  Args:
    built: the named evaluators; may be empty.
    subject: the model.
    options: options of the default evaluator; options that it lacks are ignored.

  Raises:
    UserError: a named evaluator does not fit the model, or no evaluator does.
  """
  if built:
    for name, evaluator in built.items():
      evaluators.check_fits(name, evaluator, subject.system)
    return dict(built)
  for name in evaluators.names():
    cls = evaluators.class_of(name)
    if subject.task in cls.tasks:
      known = {field.name for field in dataclasses.fields(cls)}
      evaluator = evaluators.build(name, {n: v for n, v in options.items() if n in known})
      evaluators.check_fits(name, evaluator, subject.system)
      return {name: evaluator}
  raise UserError(f'no evaluator supports {subject.task}: name one with --benchmarks')


def evaluate(
  built: Mapping[str, Mapping[str, Evaluator]],
  subjects: Mapping[str, Subject],
  folders: Mapping[str, str],
) -> None:
  """Runs evaluators on several runs, prints their tables, and writes reports and sheets.

  Args:
    built: run name -> evaluator name -> evaluator.
    subjects: run name -> model.
    folders: run name -> output folder. Sheets that combine runs go to the first folder.

  Raises:
    UserError: an evaluator rejects a model or its data, or a file can't be written.
  """
  reports: dict[str, dict[str, Report]] = {}
  stems: list[str] = []
  for run_name, subject in subjects.items():
    own = built[run_name]
    reports[run_name] = {name: evaluator.run(subject) for name, evaluator in own.items()}
    stems.append(stem(subject, own))
    lines = [line for report in reports[run_name].values() for line in report.lines]
    # Printed first, so that nothing is lost if writing fails.
    print('\n'.join([f'== {run_name}', *subject.notes, *lines]), flush=True)
    written = save(reports[run_name], folders[run_name], stems[-1])
    for path in written:
      print(f'wrote {path}', flush=True)
  for name, pairs in paired(reports).items():
    for title, figures in pairs.items():
      table = aligned([(key, number(figure, places=4)) for key, figure in figures.items()])
      print('\n'.join([f'== {name}, {title} (paired, 95% intervals)', *table]), flush=True)
  for path in save_combined(reports, next(iter(folders.values())), stems):
    print(f'wrote {path}')


def paired(
  reports: Mapping[str, Mapping[str, Report]],
) -> dict[str, dict[str, dict[str, Figure]]]:
  """Differences of each run from the first: evaluator -> `A minus B` -> name -> figure.

  Figures are paired where both runs had the same prompts and ground truth.
  """
  (first, others), *rest = reports.items()
  result: dict[str, dict[str, dict[str, Figure]]] = {}
  for run_name, reports_of_run in rest:
    for name, ours in reports_of_run.items():
      theirs = others.get(name)
      if theirs is not None and ours.items and ours.items == theirs.items:
        result.setdefault(name, {})[f'{run_name} minus {first}'] = {
          key: figure - theirs.figures[key]
          for key, figure in ours.figures.items()
          if key in theirs.figures
        }
  return result


def report_folder(workdir: str) -> str:
  """The default output folder for the reports of a run, or of a file of weights."""
  return 'evaluation' if weights.is_file(workdir) else f'{workdir}/evaluation'


def stem(subject: Subject, built: Mapping[str, Evaluator]) -> str:
  """File name stem of a report: the checkpoint, and a hash of subject and options."""
  options = {name: dataclasses.asdict(evaluator) for name, evaluator in built.items()}
  description = dict(subject.description)  # may hash all parameters
  record = json.dumps([description, options], sort_keys=True)
  return f'{description["checkpoint"]}-{hashlib.sha256(record.encode()).hexdigest()[:8]}'


def save(reports: Mapping[str, Report], folder: str, stem: str) -> list[str]:
  """Writes FOLDER/<evaluator>-<stem>.json and FOLDER/<evaluator>-<stem>-<split>.png.

  Existing files of the same name are replaced: they come from the same subject and options.

  Returns:
    Paths of the written files.

  Raises:
    UserError: the folder can't be written.
  """
  written = []
  for name, report in reports.items():
    if report.protocol:
      path = storage.resolve(folder) / f'{name}-{stem}.json'
      with storage.writing(path):
        storage.write_atomic(path, json.dumps(report.protocol, indent=1).encode())
      written.append(str(path))
    for split, sheet in report.sheets.items():
      suffix = f'-{split}' if split else ''
      path = storage.resolve(folder) / f'{name}-{stem}{suffix}.png'
      images.save_png(layout(sheet), path, overwrite=True)
      written.append(str(path))
  return written


def save_combined(
  reports: Mapping[str, Mapping[str, Report]], folder: str, stems: Sequence[str]
) -> list[str]:
  """Writes what compares several runs.

  FOLDER/<evaluator>-compared-<hash>.json has paired differences of figures, and
  FOLDER/<evaluator>-compared-<hash>-<split>.png the rows of all runs.

  Args:
    reports: run name -> evaluator name -> report; nothing is written for a single run.
    folder: output folder.
    stems: file name stems of the runs. Their hash is part of the names, so that only sheets of the
      same runs and options are replaced.

  Returns:
    Paths of the written files.

  Raises:
    UserError: the folder can't be written.
  """
  sheets: dict[tuple[str, str], dict[str, Sheet]] = {}
  for run_name, reports_of_run in reports.items():
    for name, report in reports_of_run.items():
      for split, sheet in report.sheets.items():
        sheets.setdefault((name, split), {})[run_name] = sheet
  digest = hashlib.sha256(' '.join(stems).encode()).hexdigest()[:8]
  written = []
  for name, pairs in paired(reports).items():
    record = {title: summaries(figures) for title, figures in pairs.items()}
    path = storage.resolve(folder) / f'{name}-compared-{digest}.json'
    with storage.writing(path):
      storage.write_atomic(path, json.dumps(record, indent=1).encode())
    written.append(str(path))
  for (name, split), sheets_by_run in sheets.items():
    if len(sheets_by_run) > 1:
      suffix = f'-{split}' if split else ''
      written.append(str(storage.resolve(folder) / f'{name}-compared-{digest}{suffix}.png'))
      images.save_png(layout(combine(sheets_by_run)), written[-1], overwrite=True)
  return written
