"""Runs evaluators on finished runs, prints their tables, and writes reports and sheets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vpe_jax import storage
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation.evaluator import Evaluator, Subject
from vpe_jax.evaluation.report import Report, Sheet
from vpe_jax.evaluation.sheets import layout, together
from vpe_jax.sampling import images


def chosen(
  built: Mapping[str, Evaluator], subject: Subject, options: Mapping[str, Any]
) -> dict[str, Evaluator]:
  """The evaluators for a model: those that are named, else the first for its kind of prompt.

  Args:
    built: the named ones.
    subject: the model.
    options: of the evaluator that is chosen where none is named; those that it lacks are ignored.

  Raises:
    UserError: one does not fit the model, or none does.
  """
  if built:
    for name, evaluator in built.items():
      evaluators.check_fits(name, evaluator, subject)
    return dict(built)
  for name in evaluators.names():
    cls = evaluators.class_of(name)
    if subject.task in cls.tasks:
      known = {field.name for field in dataclasses.fields(cls)}
      evaluator = evaluators.build(name, {n: v for n, v in options.items() if n in known})
      evaluators.check_fits(name, evaluator, subject)
      return {name: evaluator}
  raise UserError(f'no evaluator is for {subject.task}: name one with --benchmarks')


def evaluate(
  built: Mapping[str, Mapping[str, Evaluator]],
  subjects: Mapping[str, Subject],
  folders: Mapping[str, str],
) -> None:
  """Runs evaluators on several runs, prints their tables, and writes reports and sheets.

  Args:
    built: the evaluators of each run by name, by the name of the run.
    subjects: by the name of their run.
    folders: folder of each run's files, by its name; sheets of all runs go to the first one's.

  Raises:
    UserError: an evaluator does not fit, or a file can't be written.
  """
  reports: dict[str, dict[str, Report]] = {}
  stems: list[str] = []
  for run_name, subject in subjects.items():
    own = built[run_name]
    reports[run_name] = {name: evaluator.run(subject) for name, evaluator in own.items()}
    stems.append(stem(subject, own))
    lines = [line for report in reports[run_name].values() for line in report.lines]
    # Before anything is written, so that nothing is lost if writing fails.
    print('\n'.join([f'== {run_name}', *subject.notes, *lines]), flush=True)
    written = save(reports[run_name], folders[run_name], stems[-1])
    print('\n'.join(f'wrote {path}' for path in written), flush=True)
  for path in save_together(reports, next(iter(folders.values())), stems):
    print(f'wrote {path}')


def stem(subject: Subject, built: Mapping[str, Evaluator]) -> str:
  """Name of the files of a report: the checkpoint, and a hash of subject and options."""
  options = {name: dataclasses.asdict(evaluator) for name, evaluator in built.items()}
  record = json.dumps([dict(subject.description), options], sort_keys=True)
  return f'{subject.description["checkpoint"]}-{hashlib.sha256(record.encode()).hexdigest()[:8]}'


def save(reports: Mapping[str, Report], folder: str, stem: str) -> list[str]:
  """Writes FOLDER/<evaluator>-<stem>.json and FOLDER/<evaluator>-<stem>-<split>.png.

  A report of the same name is replaced: the same subject and options made it.

  Returns:
    The files: each JSON, and its sheets.

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


def save_together(
  reports: Mapping[str, Mapping[str, Report]], folder: str, stems: Sequence[str]
) -> list[str]:
  """Writes FOLDER/<evaluator>-compared-<hash>-<split>.png with the rows of several runs.

  Args:
    reports: of each run, by its name: its evaluators. A sheet of a single run isn't written.
    folder: folder of the sheets.
    stems: of the runs' files: their hash names the sheets, so that the same runs and options
      replace their own sheets and no others.

  Raises:
    UserError: the folder can't be written.
  """
  sheets: dict[tuple[str, str], dict[str, Sheet]] = {}
  for run_name, of_run in reports.items():
    for name, report in of_run.items():
      for split, sheet in report.sheets.items():
        sheets.setdefault((name, split), {})[run_name] = sheet
  mark = hashlib.sha256(' '.join(stems).encode()).hexdigest()[:8]
  written = []
  for (name, split), of_runs in sheets.items():
    if len(of_runs) > 1:
      suffix = f'-{split}' if split else ''
      written.append(str(storage.resolve(folder) / f'{name}-compared-{mark}{suffix}.png'))
      images.save_png(layout(together(of_runs)), written[-1], overwrite=True)
  return written
