"""Tests of profiler traces of a range of steps."""

import subprocess
import sys

from vpe_jax.training.profiler import Profiler

# Runs in a separate process: after tests have loaded libtpu, the profiler would query it for a TPU.
TRACE = """
import sys
import jax.numpy as jnp
from vpe_jax.training.profiler import Profiler

profiler, active = Profiler(range(3, 5), sys.argv[1]), []
for step in range(1, 8):
  profiler.before(step)
  active.append(profiler._active)
  profiler.after(step, {'loss': jnp.ones(())})
assert active == [False, False, True, True, False, False, False], active
"""


def test_only_the_range_is_traced(tmp_path):
  command = [sys.executable, '-c', TRACE, str(tmp_path)]
  process = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert process.returncode == 0, process.stderr
  assert list(tmp_path.rglob('*.xplane.pb'))


def test_empty_range_never_traces(tmp_path):
  profiler = Profiler(range(0), str(tmp_path))
  profiler.before(1)
  profiler.close()
  assert not list(tmp_path.iterdir())
