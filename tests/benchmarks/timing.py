"""Shared by all benchmarks: an idle machine, alternating sides, and a JSON report.

Sides run in turn (A B A B ...), so that a drift of the machine's speed affects both; a ratio is
the median over rounds of the ratios of the two times.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from vpe_jax import front_door
from vpe_jax.contracts import UserError

LOAD = 0.5  # maximum load average of other work; a higher load distorts timings
TOLERANCE = 1e-4  # of the largest absolute value
_PAUSE = 0.5  # seconds before each call: threads of the previous side spin for a while

flags.DEFINE_string('json', '', 'file for the results; empty: none')
flags.DEFINE_bool('force', False, 'measure on a busy machine too; the JSON has its load')


def main(measure: Callable[[], dict[str, Any]]) -> None:
  """Runs a benchmark as a command: `measure` returns its results, with `ratio` or `ratios`."""
  load = os.getloadavg()[0]  # Before our own work starts.

  def command() -> None:
    print(f'load average before the start: {load:.2f}', flush=True)
    if load > LOAD and not flags.FLAGS.force:
      raise UserError(
        f'other work loads the machine ({load:.2f}, at most {LOAD} is allowed): wait until it is '
        'done, or measure anyway with --force'
      )
    results = measure() | {'load_average': load, 'machine': _machine()}
    text = json.dumps(results, indent=2)
    print(text, flush=True)
    if flags.FLAGS.json:
      Path(flags.FLAGS.json).write_text(text + '\n')

  front_door.run(command)


def alternate(
  sides: Mapping[str, Callable[[], Any]], rounds: int = 7, warm: bool = False
) -> dict[str, list[float]]:
  """Seconds of each side in each round.

  Args:
    sides: name -> a call that returns when its work is done.
    rounds: timed rounds.
    warm: whether every side has run before; else a first round, which compiles, isn't timed.
  """
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for index in range(warm, rounds + 1):
    for name, call in sides.items():
      time.sleep(_PAUSE)
      start = time.perf_counter()
      call()
      if index:
        seconds[name].append(time.perf_counter() - start)
    print(f'round {index}/{rounds}', file=sys.stderr, flush=True)
  return seconds


def ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> float:
  """How many times faster `ours` is: the median over rounds of their time by our time."""
  pairs = zip(seconds[theirs], seconds[ours], strict=True)
  return round(statistics.median(b / a for b, a in pairs), 3)


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
  """The median of each side, in milliseconds."""
  return {name: round(1e3 * statistics.median(values), 3) for name, values in seconds.items()}


def check_equal(ours: Any, theirs: Any, name: str, tolerance: float = TOLERANCE) -> float:
  """The largest difference as a share of the largest absolute value.

  Raises:
    UserError: it is above `tolerance`, so the sides compute different results.
  """
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  error = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
  if not error <= tolerance:
    raise UserError(f'{name}: the sides differ by {error:.1e} of the largest value')
  return error


def _machine() -> dict[str, Any]:
  return {
    'cores': len(os.sched_getaffinity(0)),
    'processor': platform.machine(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'devices': [device.device_kind for device in jax.devices()],
  }
