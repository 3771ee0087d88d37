"""The evaluate command: mistakes are one line and status 2."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  'args, message',
  [
    ([], '--workdir is missing'),
    (['--workdir=w', '--benchmarks=retrival'], "did you mean 'retrieval'"),
    (['--workdir=w', '--splits=concepts'], "did you mean 'concept'"),
    (['--workdir=/no/such/run'], '/no/such/run'),
  ],
)
def test_mistakes_are_one_line_and_status_2(args, message):
  command = [sys.executable, '-m', 'vpe_jax.evaluate', *args]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith('error: ') and message in line
  assert 'Traceback' not in done.stderr
