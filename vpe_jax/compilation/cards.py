"""Writes a table of `vpe_jax.compile` reports into the card of a config (configs/README.md).

launch/compile_all.sh compiles every paper-size config and then calls this.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vpe_jax import storage
from vpe_jax.contracts import UserError

_BEGIN, END = '<!-- compiled:', '<!-- end -->'
_PLAIN = re.compile(r'[^|<>\x00-\x1f\x7f-\uffff]*')
_TITLES = ('config', 'stage', 'topology', 'images', 'memory', 'HBM', 'step at least', 'MFU at most')


def table(reports: Sequence[Mapping[str, Any]]) -> str:
  """Formats reports (from `Report.as_dict`) as a Markdown table."""
  rows = [_TITLES, ('---',) * len(_TITLES), *map(_row, reports)]
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def begin(name: str) -> str:
  """The line before the table of a config."""
  return f'{_BEGIN} {name} -->\n'


def rewrite(text: str, name: str, reports: Sequence[Mapping[str, Any]]) -> str:
  """Replaces the table of a config in the text of the cards.

  Args:
    text: text of the file of cards.
    name: name of the config.
    reports: from `Report.as_dict`.

  Returns:
    The new text of the file.

  Raises:
    UserError: the card has no line `begin(name)`, or no END before the next card's table.
  """
  before, marker, rest = text.partition(begin(name))
  old, end, after = rest.partition(END)
  if not marker or not end or _BEGIN in old:
    raise UserError(f'the card needs the lines "{begin(name).strip()}" and "{END}"')
  return before + marker + table(reports) + end + after


def _row(report: Mapping[str, Any]) -> tuple[str, ...]:
  """The cells of a report; '-' for unknown values (virtual devices, failed compilation)."""
  fits = '' if report['fits'] else ' (does not fit)'
  percent = lambda share: '-' if share is None else f'{share:.0%}'
  bound = report['step_time_bound_s']
  cells = (
    report['config'].partition(':')[2],
    report['stage'] if report['program'] == 'train' else report['program'],
    report['topology'],
    f'{report["images_per_step"]:,}',
    f'{report["peak_bytes_per_device"] / 1e9:.1f} GB',
    f'{percent(report["hbm_fraction"])}{fits}',
    '-' if bound is None else f'{bound:.2f} s ({report["bound_by"]})',
    percent(report['mfu_bound']),
  )
  if not all(_PLAIN.fullmatch(cell) for cell in cells):  # A cell must not break the table.
    raise ValueError(f'a cell is not plain text: {cells}')
  return cells


def _report(file: epath.Path) -> Mapping[str, Any]:
  """Reads a report.

  Raises:
    UserError: the file is not a complete report.
  """
  try:
    report = json.loads(file.read_bytes().decode('utf-8'))
    _row(report)
    return report
  except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise UserError(
      f'{file} is not a report of vpe_jax.compile ({reason}): remove it, or compile again'
    ) from error


def write(config: str, folder: str) -> int:
  """Rewrites the table of a config in the README.md beside it, from the reports in a folder.

  Args:
    config: path of the config file.
    folder: local or gs:// folder of JSON reports of vpe_jax.compile; reports of other configs are
      skipped.

  Returns:
    The number of table rows.

  Raises:
    UserError: the config doesn't exist; the README.md doesn't exist, has no lines around the table
      or can't be written; the folder has no report of the config, or has a JSON file that is not
      a report.
  """
  path = pathlib.Path(config)
  cards = path.with_name('README.md')
  for file in (path, cards):
    if not file.is_file():
      raise UserError(f'{file}: no such file; name a config such as configs/t2i.py')
  place = storage.resolve(folder)
  exists = storage.probe(place, place.is_dir)
  reports = [_report(file) for file in sorted(place.glob('*.json'))] if exists else []
  reports = [report for report in reports if report['config'].partition(':')[0] == path.stem]
  if not reports:
    raise UserError(f'{folder} has no reports of {config}: run launch/compile_all.sh')
  text = rewrite(cards.read_text('utf-8'), path.stem, reports)
  with storage.writing(cards):
    storage.write_atomic(cards, text.encode())
  return len(reports)
