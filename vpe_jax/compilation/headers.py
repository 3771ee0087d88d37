"""Writes what `vpe_jax.compile` found into the header of the config that it was asked about.

launch/compile_all.sh compiles every paper-size config and has this done at its end.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vpe_jax import storage
from vpe_jax.contracts import UserError

BEGIN = 'Compiled for pods by launch/compile_all.sh, which writes this table:\n'
END = '(end of the table)\n'
_PLAIN = re.compile(r'[^"\\\x00-\x1f\x7f-\uffff]*')
_TITLES = ('config', 'stage', 'topology', 'images', 'memory', 'HBM', 'step at least', 'MFU at most')


def table(reports: Sequence[Mapping[str, Any]]) -> str:
  """The lines between the marks, for reports as `Report.as_dict` makes them."""
  rows = [_TITLES, *map(_row, reports)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
  lines = (
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
  )
  return ''.join(f'  {line.rstrip()}\n' for line in lines)


def rewrite(text: str, reports: Sequence[Mapping[str, Any]]) -> str:
  """A config file's text with the table of these reports in its header.

  Raises:
    UserError: the header has no marks.
  """
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise UserError(f'the header needs the lines "{BEGIN.strip()}" and "{END.strip()}"')
  return before + begin + table(reports) + end + after


def _row(report: Mapping[str, Any]) -> tuple[str, ...]:
  """The cells of a report; '-' for what isn't known: of virtual devices, or of no program."""
  fits = '' if report['fits'] else ' (does not fit)'
  percent = lambda share: '-' if share is None else f'{share:.0%}'
  bound = report['step_time_bound_s']
  cells = (
    report['config'].partition(':')[2],
    report['stage'] if report['what'] == 'train' else report['what'],
    report['topology'],
    f'{report["images_per_step"]:,}',
    f'{report["peak_bytes_per_chip"] / 1e9:.1f} GB',
    f'{percent(report["hbm_fraction"])}{fits}',
    '-' if bound is None else f'{bound:.2f} s ({report["bound_by"]})',
    percent(report['mfu_bound']),
  )
  if not all(_PLAIN.fullmatch(cell) for cell in cells):  # It becomes part of a Python file.
    raise ValueError(f'a cell that is no plain text: {cells}')
  return cells


def _report(file: pathlib.Path) -> Mapping[str, Any]:
  """What a file of the folder holds.

  Raises:
    UserError: it is no report, or not all of one.
  """
  try:
    report = json.loads(file.read_text('utf-8'))
    _row(report)
    return report
  except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise UserError(
      f'{file} is no report of vpe_jax.compile ({reason}): remove it, or compile again'
    ) from error


def write(config: str, folder: str) -> int:
  """Rewrites a config file's header from the reports in a folder.

  Args:
    config: the file.
    folder: with JSON files of vpe_jax.compile; those of other configs are left out.

  Returns:
    The number of rows.

  Raises:
    UserError: there is no such file, it has no marks or can't be written, the folder has no report
      on it, or a file that is none.
  """
  path = pathlib.Path(config)
  if not path.is_file():
    raise UserError(f'{config}: no such file; name a config such as configs/t2i.py')
  found = [_report(file) for file in sorted(pathlib.Path(folder).glob('*.json'))]
  reports = [one for one in found if one['config'].partition(':')[0] == path.stem]
  if not reports:
    raise UserError(f'{folder} has no reports on {config}: launch/compile_all.sh makes them')
  text = rewrite(path.read_text('utf-8'), reports)
  with storage.writing(path):
    storage.write_atomic(path, text.encode())
  return len(reports)
