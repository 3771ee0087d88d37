"""Puts what launch/verify_device.sh has seen into one JSON; the script calls it.

  python -m tests.benchmarks.device_report FOLDER OUT

FOLDER has `phases` (a line for each: name, exit status, seconds), NAME.log of each, the runs'
folders, and benchmark.json.
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
_SHOWN = 15  # last lines of a phase that failed


def report(folder: Path) -> dict[str, Any]:
  """The report; `passed` where every phase has."""
  phases = {}
  for line in (folder / 'phases').read_text().splitlines():
    name, status, seconds = line.split()
    phases[name] = {'passed': status == '0', 'seconds': int(seconds)}
    if status != '0':
      log = (folder / f'{name}.log').read_text(errors='replace').splitlines()
      phases[name]['end'] = log[-_SHOWN:]
    if (folder / name / 'metrics.jsonl').exists():
      last = metrics.read(folder / name)[-1]
      kept = ('step', 'loss', 'step_time', 'images_per_s', 'mfu')
      phases[name]['last_step'] = {key: last[key] for key in kept if key in last}
  figures = folder / 'benchmark.json'
  return {
    'passed': all(phase['passed'] for phase in phases.values()),
    'devices': [f'{device.platform}: {device.device_kind}' for device in jax.devices()],
    'python': platform.python_version(),
    'versions': {name: _version(name) for name in _PACKAGES},
    'phases': phases,
    'attention': json.loads(figures.read_text()) if figures.exists() else None,
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def main(folder: str, out: str) -> None:
  """Writes the report and says how it ended."""
  found = report(Path(folder))
  Path(out).write_text(json.dumps(found, indent=2) + '\n')
  failed = [name for name, phase in found['phases'].items() if not phase['passed']]
  print(
    f'wrote {out}: {"everything passed" if found["passed"] else "failed: " + ", ".join(failed)}'
  )
  sys.exit(0 if found['passed'] else 1)


if __name__ == '__main__':
  main(*sys.argv[1:])
