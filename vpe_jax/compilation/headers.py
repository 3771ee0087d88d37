"""Writes what `vpe_jax.compile` found into the header of the config that it was asked about.

  python -m vpe_jax.compilation.headers --config=configs/t2i.py --reports=runs/compile

launch/compile_all.sh compiles every paper-size config and calls this at its end.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from vpe_jax import front_door
from vpe_jax.contracts import UserError

FLAGS = flags.FLAGS
BEGIN = 'Compiled for pods by launch/compile_all.sh, which writes this table:\n'
END = '(end of the table)\n'
_TITLES = ('preset', 'stage', 'topology', 'images', 'memory', 'HBM', 'step at least', 'MFU at most')


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


def main() -> None:
  """Runs the command."""
  if FLAGS.config is None or FLAGS.reports is None:
    raise UserError('--config=FILE.py and --reports=FOLDER are needed')
  path, folder = pathlib.Path(FLAGS.config), pathlib.Path(FLAGS.reports)
  found = [json.loads(file.read_text(encoding='utf-8')) for file in sorted(folder.glob('*.json'))]
  reports = [one for one in found if one['config'].partition(':')[0] == path.stem]
  if not reports:
    raise UserError(f'{folder} has no reports on {path}: launch/compile_all.sh makes them')
  path.write_text(rewrite(path.read_text(encoding='utf-8'), reports), encoding='utf-8')
  print(f'{path}: {len(reports)} rows')


if __name__ == '__main__':
  flags.DEFINE_string('config', None, 'the config file to rewrite')
  flags.DEFINE_string('reports', None, 'the folder with the JSON files of vpe_jax.compile')
  front_door.run(main)
