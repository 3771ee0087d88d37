"""Writes the report of launch/verify_device.sh, which calls this program.

  python -m tests.benchmarks.device_report FOLDER OUT

FOLDER has the file `phases` (a line per phase: name, exit status, seconds), NAME.log of each phase,
the runs' folders, and benchmark.json. OUT is a JSON file.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from vpe_jax.training import metrics

_PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'orbax-checkpoint', 'vpe_jax')
_LOG_LINES = 15  # last lines of the log of a failed phase


def report(folder: Path) -> dict[str, Any]:
  """The report; `passed` is true if every phase passed."""
  phases = {}
  for line in (folder / 'phases').read_text().splitlines():
    name, status, seconds = line.split()
    phases[name] = {'passed': status == '0', 'seconds': int(seconds)}
    if status != '0':
      log = (folder / f'{name}.log').read_text(errors='replace').splitlines()
      phases[name]['end'] = log[-_LOG_LINES:]
    if (folder / name / 'metrics.jsonl').exists():
      last = metrics.read(folder / name)[-1]
      keys = ('step', 'loss', 'step_time', 'images_per_s', 'mfu')
      phases[name]['last_step'] = {key: last[key] for key in keys if key in last}
  benchmark = folder / 'benchmark.json'
  return {
    'passed': all(phase['passed'] for phase in phases.values()),
    'devices': [f'{device.platform}: {device.device_kind}' for device in jax.devices()],
    'python': platform.python_version(),
    'versions': {name: _version(name) for name in _PACKAGES},
    'phases': phases,
    'attention': json.loads(benchmark.read_text()) if benchmark.exists() else None,
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def main(folder: str, out: str) -> None:
  """Writes the report, and exits with status 1 if a phase failed."""
  summary = report(Path(folder))
  Path(out).write_text(json.dumps(summary, indent=2) + '\n')
  failed = [name for name, phase in summary['phases'].items() if not phase['passed']]
  print(
    f'wrote {out}: {"everything passed" if summary["passed"] else "failed: " + ", ".join(failed)}'
  )
  sys.exit(0 if summary['passed'] else 1)


if __name__ == '__main__':
  main(*sys.argv[1:])
