"""Ctrl-C during imports and in compiled code: one line, status 130, within seconds."""

import signal
import subprocess
import sys
import time

import pytest

from tests import commands
from vpe_jax import interrupts

TOY = 'tests.toy_command'


@pytest.mark.parametrize('module', ['vpe_jax.main', 'vpe_jax.sample'])
def test_during_imports(module):
  command = [sys.executable, '-X', 'importtime', '-m', module]
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=commands.ROOT)
  for line in process.stderr:
    if line.startswith('import time:') and 'jax' in line.replace('vpe_jax', ''):
      break
  process.send_signal(signal.SIGINT)
  _, rest = process.communicate(timeout=60)
  said = [line for line in rest.splitlines() if not line.startswith('import time:')]
  assert (process.returncode, said) == (interrupts.INTERRUPTED, ['interrupted'])


@pytest.mark.parametrize('presses, limit', [(1, 3 * interrupts.GRACE), (2, interrupts.GRACE)])
def test_in_compiled_code(tmp_path, presses, limit):
  out, err = tmp_path / 'out', tmp_path / 'err'
  command = commands.Command(TOY, '--n=60', stdout=out, stderr=err)
  while not (out.exists() and 'busy' in out.read_text()):
    assert command.poll() is None
    time.sleep(0.05)
  start = time.monotonic()
  for _ in range(presses):
    command.send(signal.SIGINT)
    time.sleep(0.3)
  assert command.wait() == interrupts.INTERRUPTED
  assert err.read_text() == 'interrupted\n'
  assert time.monotonic() - start < limit


def test_a_library_import_changes_no_handler():
  code = (
    'import signal; before = signal.getsignal(signal.SIGINT); import vpe_jax; '
    'print(signal.getsignal(signal.SIGINT) == before)'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=commands.ROOT
  )
  assert result.stdout == 'True\n', result.stderr


def _leave(prepare: str) -> subprocess.CompletedProcess:
  """Runs `leave` in a process of its own, after some lines of code."""
  code = f'import os, signal, sys\nfrom vpe_jax import interrupts\n{prepare}\ninterrupts.leave()'
  command = [sys.executable, '-c', code]
  return subprocess.run(command, capture_output=True, text=True, cwd=commands.ROOT, timeout=60)


def test_the_status_needs_no_reader_of_the_message():
  broken = "r, w = os.pipe(); os.close(r); sys.stderr = os.fdopen(w, 'w', buffering=1)"
  assert _leave(broken).returncode == interrupts.INTERRUPTED


@pytest.mark.parametrize('before', ['interrupts.exit_at_once()', 'interrupts.watch()'])
def test_a_second_interrupt_while_leaving_ends_the_process(before):
  press = 'lambda text: os.kill(os.getpid(), signal.SIGINT)'
  process = _leave(f'{before}\nsys.stderr.write = {press}')
  assert (process.returncode, process.stderr) == (-signal.SIGINT, '')
