"""Runs benchmarks on something that draws pictures, and reports them as a table and JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vpe_jax import rng, storage
from vpe_jax.config import nearest
from vpe_jax.contracts import UserError
from vpe_jax.data.records import SPLITS, render
from vpe_jax.evaluation import classes, editing, ocr, planning, retrieval
from vpe_jax.evaluation.judge import Judge
from vpe_jax.evaluation.report import Options, Report, Row, Sheet, Subject, Task, protocol
from vpe_jax.evaluation.sheets import layout, together
from vpe_jax.sampling import pictures

_TASKS: Mapping[Task, str] = {
  'captions': 'what captions say',
  'classes': 'pictures of classes',
  'words': 'written words',
  'edits': 'edits of pictures',
}
# The bars of the retrieval benchmark, which `verdict` checks.
_TRUE_BAR = 0.6  # accuracy on the true images: is the judge good enough to judge?
_SHARE_BAR = 0.5  # of it, that generated pictures reach
_CHANCES_BAR = 3  # times chance, that pictures of a quickstart run reach


def check(names: Sequence[str], options: Options) -> None:
  """Finds mistakes before anything is loaded.

  Raises:
    UserError: an unknown benchmark or split, a seed that is none, or too few captions, plans or
      mixes.
  """
  for name in names:
    if name not in BENCHMARKS:
      raise UserError(f"unknown benchmark '{name}'{nearest(name, BENCHMARKS)}")
  for split in options.splits:
    if split not in SPLITS:
      raise UserError(f"unknown split '{split}'{nearest(split, SPLITS)}")
  rng.check_seed(options.seed)
  if options.captions < 2:
    raise UserError(f'captions is {options.captions}: at least 2 are needed to permute them')
  if 'best_of' in names and options.best_of < 2:
    raise UserError(f'best_of is {options.best_of}: at least 2 plans are needed to choose among')
  if 'mixes' in names and options.mixes < 2:
    raise UserError(f'mixes is {options.mixes}: at least 2 are needed for a mean and its interval')


def asked(names: Sequence[str], options: Options) -> list[str]:
  """The benchmarks that are named, and those that options of their own ask for.

  Raises:
    UserError: see `check`.
  """
  own = [name for name in ('best_of', 'mixes') if getattr(options, name)]
  found = list(dict.fromkeys([*names, *own]))
  check(found, options)
  return found


def chosen(names: Sequence[str], subject: Subject) -> list[str]:
  """The benchmarks of these names, or where there are none, the one of what the subject draws.

  Raises:
    UserError: one doesn't fit the subject, or needs packages that aren't installed.
  """
  fitting = [name for name, one in BENCHMARKS.items() if one.task == subject.task]
  for name in names:
    if name not in fitting:
      raise UserError(
        f'the benchmark {name} asks for {_TASKS[BENCHMARKS[name].task]}, and '
        f'{subject.description.get("weights", "this model")} draws {_TASKS[subject.task]}: '
        f'it has {", ".join(fitting)}'
      )
  found = list(names) or fitting[:1]
  for name in found:
    BENCHMARKS[name].ready()
  return found


def run(names: Sequence[str], subject: Subject, options: Options) -> dict[str, Report]:
  """Runs benchmarks by name.

  Raises:
    UserError: see `check` and `chosen`.
  """
  check(names, options)
  return {name: BENCHMARKS[name].report(subject, options) for name in chosen(names, subject)}


def evaluate(
  names: Sequence[str],
  subjects: Mapping[str, Subject],
  options: Options,
  folders: Mapping[str, str],
) -> None:
  """Runs benchmarks on several runs, prints their tables, and writes reports and sheets.

  Args:
    names: of the benchmarks; none: what fits each subject.
    subjects: by the name of their run.
    options: of the benchmarks.
    folders: where each run's files go, by its name; those of all go to the first one's.

  Raises:
    UserError: see `run` and `save`.
  """
  reports, stems = {}, []
  for run_name, subject in subjects.items():
    reports[run_name] = run(names, subject, options)
    stems.append(stem(subject, options))
    lines = [line for report in reports[run_name].values() for line in report.lines]
    # Before anything is written, so that nothing is lost if that fails.
    print('\n'.join([f'== {run_name}', *subject.foreign, *lines]), flush=True)
    written = save(reports[run_name], folders[run_name], stems[-1])
    print('\n'.join(f'wrote {path}' for path in written), flush=True)
  for path in save_together(reports, next(iter(folders.values())), stems):
    print(f'wrote {path}')


def retrieval_report(subject: Subject, options: Options) -> Report:
  """Retrieval of held-out captions; see vpe_jax.evaluation.retrieval."""
  judge = Judge.load(options.judge)
  results, lines, sheets = {}, [], {}
  for split in options.splits:
    start = time.time()
    trials, records = retrieval.make_trials(options.captions, split, options.seed)
    captions = retrieval.embed(judge.captions, trials)
    true = np.stack([render(record, subject.image_size) for record in records])
    drawn = subject.draw([trial.caption for trial in trials])
    rows = {'true images': true, 'generated': drawn}
    found = {}
    for row, images in rows.items():
      vectors = judge.images(images)
      found[row] = retrieval.measure(vectors, captions, trials)
      found[f'{row}, captions permuted'] = retrieval.permuted(vectors, captions, trials)
    lines += table(split, found)
    results[split] = {
      'rows': {row: result.summary() for row, result in found.items()},
      'generated_over_true': _ratio(found),
      'bars': verdict(found),
      'seconds': round(time.time() - start, 1),
      'captions': [
        {'caption': trial.caption, 'true': float(a), 'generated': float(b)}
        for trial, a, b in zip(trials, found['true images'].credit, found['generated'].credit)
      ],
    }
    told = [trial.caption for trial in trials]
    sheets[split] = (Row.first('true', true, told), Row.first('generated', drawn))
  question = 'does the picture score highest with its own caption?'
  said = {
    'candidates': retrieval.CANDIDATES,
    'hard_distractors': retrieval.HARD,
    'chance': 1 / retrieval.CANDIDATES,
    'ties': f'credit is shared among captions whose cosines differ by at most {retrieval.TIE}',
    'permuted': 'each picture against trials of other pictures, up to 16 cyclic shifts',
    'relations': 'true caption against each other relation, in pairs, not among the candidates',
    'source': 'vpe_jax.data.embedded.scenes',
    'judge_checkpoint': judge.fingerprint,
  }
  return Report(
    tuple(lines), protocol('retrieval', question, subject, options, results, **said), sheets
  )


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One that can be asked for.

  Attributes:
    report: runs it.
    task: what its subjects draw from.
    ready: finds out before anything is drawn whether what it needs is installed.
  """

  report: Callable[[Subject, Options], Report]
  task: Task
  ready: Callable[[], None] = lambda: None


# The first of a task is what runs where none is asked for.
BENCHMARKS: Mapping[str, Benchmark] = {
  'retrieval': Benchmark(retrieval_report, 'captions'),
  'best_of': Benchmark(planning.best_of_report, 'captions'),
  'mixes': Benchmark(planning.mixes_report, 'captions'),
  'edits': Benchmark(editing.edits_report, 'edits'),
  'classes': Benchmark(classes.classes_report, 'classes'),
  'ocr': Benchmark(ocr.ocr_report, 'words', ocr.check_installed),
}


def table(split: str, found: Mapping[str, retrieval.Result]) -> list[str]:
  """The results of one split as aligned lines."""
  chance, among = 1 / retrieval.CANDIDATES, 1 / (1 + retrieval.HARD)
  lines = [
    f'split {split}: own caption first among {retrieval.CANDIDATES} '
    f'(chance {chance:.1%}), among it and the {retrieval.HARD} hard ones (chance {among:.1%}), '
    'and before one with another relation (chance 50%)',
    f'  {"pictures":32}{"among 32":>10}{"95% interval":>18}{"hard only":>12}{"relation":>11}',
  ]
  for row, result in found.items():
    low, high = result.interval
    relation = '-' if result.relation is None else f'{result.relation:.1%}'
    lines.append(
      f'  {row:32}{result.accuracy:>10.1%}{f"{low:.1%} to {high:.1%}":>18}'
      f'{result.hard.mean():>12.1%}{relation:>11}'
    )
  if found['true images'].interval[0] <= chance:
    return [
      *lines,
      '  the judge finds true images no better than chance here: this split says nothing about '
      'generated ones',
    ]
  lines.append(f'  generated pictures reach {_ratio(found):.0%} of what the true images reach')
  words = {True: 'reached', False: 'not reached'}
  return lines + [f'  bar: {bar}: {words[passed]}' for bar, passed in verdict(found).items()]


def verdict(found: Mapping[str, retrieval.Result]) -> dict[str, bool]:
  """Each bar of the protocol in words, and whether the results of one split reach it."""
  chance = 1 / retrieval.CANDIDATES
  true, generated = found['true images'].accuracy, found['generated'].accuracy
  permuted = [result.accuracy for row, result in found.items() if row.endswith('permuted')]
  return {
    f'true images at least {_TRUE_BAR:.0%}': true >= _TRUE_BAR,
    f'generated at least {_SHARE_BAR:.0%} of true images': generated >= _SHARE_BAR * true > 0,
    f'generated at least {_CHANCES_BAR} x chance ({_CHANCES_BAR * chance:.1%}), as of a quickstart '
    'run': generated >= _CHANCES_BAR * chance,
    f'permuted at most chance ({chance:.1%})': max(permuted, default=0.0) <= chance,
  }


def stem(subject: Subject, options: Options) -> str:
  """What names the files of a report: the checkpoint, and a hash of all that was asked for."""
  asked = json.dumps([dict(subject.description), dataclasses.asdict(options)], sort_keys=True)
  return f'{subject.description["checkpoint"]}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}'


def save(reports: Mapping[str, Report], folder: str, stem: str) -> list[str]:
  """Writes FOLDER/<benchmark>-<stem>.json and FOLDER/<benchmark>-<stem>-<split>.png.

  A report of the same name is replaced: the same subject and options made it.

  Returns:
    The files: each JSON, and its sheets.

  Raises:
    UserError: the folder can't be written.
  """
  written = []
  for name, report in reports.items():
    path = storage.place(folder) / f'{name}-{stem}.json'
    with storage.writing(path):
      storage.write_atomic(path, json.dumps(report.protocol, indent=1).encode())
    sheets = []
    for split, sheet in report.sheets.items():
      sheets.append(path.parent / f'{name}-{stem}-{split}.png')
      pictures.save_png(layout(sheet), sheets[-1], overwrite=True)
    written += [str(path), *map(str, sheets)]
  return written


def save_together(
  reports: Mapping[str, Mapping[str, Report]], folder: str, stems: Sequence[str]
) -> list[str]:
  """Writes FOLDER/<benchmark>-compared-<hash>-<split>.png with the rows of several runs.

  Args:
    reports: of each run, by its name: its benchmarks. A sheet that one run alone has isn't written.
    folder: where the sheets go.
    stems: of the runs' files: what they hash to names the sheets, so that these runs, asked in the
      same way, replace theirs and no others'.

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
      written.append(str(storage.place(folder) / f'{name}-compared-{mark}-{split}.png'))
      pictures.save_png(layout(together(of_runs)), written[-1], overwrite=True)
  return written


def _ratio(found: Mapping[str, retrieval.Result]) -> float | None:
  """Accuracy of the generated pictures over that of the true ones; None where that is 0."""
  true = found['true images'].accuracy
  return found['generated'].accuracy / true if true else None
