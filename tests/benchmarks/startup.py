"""Time from the command to its first step, with and without the cache of compiled programs.

  python -m tests.benchmarks.startup --json=startup.json

`ratio` is the speedup of the first step of configs/t2i.py:debug if an earlier run has saved its
compiled programs in the cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from tests.benchmarks import timing
from vpe_jax.contracts import UserError

flags.DEFINE_integer('rounds', 3, 'runs of each side')
_POLL = 0.02  # seconds between reads of the run's metrics


def first_step(cache: Path, workdir: Path) -> float:
  """Seconds from the command until the first step is logged; the run is then killed."""
  command = [
    sys.executable, '-m', 'vpe_jax.main', '--config=configs/t2i.py:debug', f'--workdir={workdir}',
    '--config.data.source=synthetic', '--config.log.every=1',
  ]  # fmt: skip
  cleared = ('JAX_COMPILATION_CACHE_DIR', 'XLA_FLAGS')
  environment = {name: value for name, value in os.environ.items() if name not in cleared}
  environment['VPE_JAX_CACHE'] = str(cache)
  start = time.perf_counter()
  with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
    metrics = workdir / 'metrics.jsonl'
    while not (metrics.exists() and _has_step(metrics)):
      if process.poll() is not None:
        raise UserError(f'the run ended with status {process.returncode} before its first step')
      time.sleep(_POLL)
    seconds = time.perf_counter() - start
    process.kill()
  return seconds


def _has_step(metrics: Path) -> bool:
  lines = metrics.read_text().splitlines()
  return bool(lines) and 'step' in json.loads(lines[0])


def measure() -> dict[str, Any]:
  """Measures cold and warm starts in turn; an uncounted run fills the cache of the warm ones."""
  seconds: dict[str, list[float]] = {'cold': [], 'warm': []}
  with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    first_step(root / 'warm', root / 'fill')
    for index in range(flags.FLAGS.rounds):
      seconds['cold'].append(first_step(root / f'cold-{index}', root / f'a-{index}'))
      seconds['warm'].append(first_step(root / 'warm', root / f'b-{index}'))
  pairs = zip(seconds['cold'], seconds['warm'], strict=True)
  return {
    'ratio': round(statistics.median(cold / warm for cold, warm in pairs), 3),
    'seconds': {side: round(statistics.median(values), 2) for side, values in seconds.items()},
  }


if __name__ == '__main__':
  timing.main(measure)
