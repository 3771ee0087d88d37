"""Writes what `vpe_jax.compile` found into the header of the config that it was asked about.

launch/compile_all.sh compiles every paper-size config and has this done at its end.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vpe_jax.contracts import UserError

BEGIN = 'Compiled for pods by launch/compile_all.sh, which writes this table:\n'
END = '(end of the table)\n'
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
  fits = '' if report['fits'] else ' (does not fit)'
  return (
    report['config'].partition(':')[2],
    report['stage'] if report['what'] == 'train' else report['what'],
    report['topology'],
    f'{report["images_per_step"]:,}',
    f'{report["peak_bytes_per_chip"] / 1e9:.1f} GB',
    f'{report["hbm_fraction"]:.0%}{fits}',
    f'{report["step_time_bound_s"]:.2f} s ({report["bound_by"]})',
    f'{report["mfu_bound"]:.0%}',
  )


def write(config: str, folder: str) -> int:
  """Rewrites a config file's header from the reports in a folder.

  Args:
    config: the file.
    folder: with JSON files of vpe_jax.compile; those of other configs are left out.

  Returns:
    The number of rows.

  Raises:
    UserError: there is no such file, it has no marks, or the folder no report on it.
  """
  path = pathlib.Path(config)
  if not path.is_file():
    raise UserError(f'{config}: no such file; name a config such as configs/t2i.py')
  found = [
    json.loads(file.read_text('utf-8')) for file in sorted(pathlib.Path(folder).glob('*.json'))
  ]
  reports = [one for one in found if one['config'].partition(':')[0] == path.stem]
  if not reports:
    raise UserError(f'{folder} has no reports on {config}: launch/compile_all.sh makes them')
  path.write_text(rewrite(path.read_text('utf-8'), reports), 'utf-8')
  return len(reports)
