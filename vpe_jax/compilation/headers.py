"""Writes a table of `vpe_jax.compile` reports into the header of a config file.

launch/compile_all.sh compiles every paper-size config and then calls this.
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
  """Formats reports (from `Report.as_dict`) as the lines between the markers."""
  rows = [_TITLES, *map(_row, reports)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
  lines = (
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
  )
  return ''.join(f'  {line.rstrip()}\n' for line in lines)


def rewrite(text: str, reports: Sequence[Mapping[str, Any]]) -> str:
  """Replaces the table in the header of a config file.

  Args:
    text: of the config file.
    reports: from `Report.as_dict`.

  Returns:
    The new text of the file.

  Raises:
    UserError: the header has no markers.
  """
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise UserError(f'the header needs the lines "{BEGIN.strip()}" and "{END.strip()}"')
  return before + begin + table(reports) + end + after


def _row(report: Mapping[str, Any]) -> tuple[str, ...]:
  """The cells of a report; '-' for unknown values (virtual devices, failed compilation)."""
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
  if not all(_PLAIN.fullmatch(cell) for cell in cells):  # The table is part of a Python file.
    raise ValueError(f'a cell is not plain text: {cells}')
  return cells


def _report(file: pathlib.Path) -> Mapping[str, Any]:
  """Reads a report.

  Raises:
    UserError: the file is not a complete report.
  """
  try:
    report = json.loads(file.read_text('utf-8'))
    _row(report)
    return report
  except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise UserError(
      f'{file} is not a report of vpe_jax.compile ({reason}): remove it, or compile again'
    ) from error


def write(config: str, folder: str) -> int:
  """Rewrites the table in a config file's header from the reports in a folder.

  Args:
    config: path of the config file.
    folder: folder of JSON reports of vpe_jax.compile; reports of other configs are skipped.

  Returns:
    The number of table rows.

  Raises:
    UserError: the config file doesn't exist, has no markers or can't be written; the folder has no
      report of the config, or a JSON file that is not a report.
  """
  path = pathlib.Path(config)
  if not path.is_file():
    raise UserError(f'{config}: no such file; name a config such as configs/t2i.py')
  files = [_report(file) for file in sorted(pathlib.Path(folder).glob('*.json'))]
  reports = [report for report in files if report['config'].partition(':')[0] == path.stem]
  if not reports:
    raise UserError(f'{folder} has no reports of {config}: run launch/compile_all.sh')
  text = rewrite(path.read_text('utf-8'), reports)
  with storage.writing(path):
    storage.write_atomic(path, text.encode())
  return len(reports)
