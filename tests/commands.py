"""Commands in separate processes, forked from a server that has imported the libraries."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 300.0  # seconds for a command
# A fork takes a moment; importing JAX and the training loop takes seconds. Nothing here starts a
# JAX backend, which a fork would break.
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['vpe_jax.training.loop', 'vpe_jax.front_door', 'tests.commands'])


@dataclasses.dataclass(frozen=True)
class Done:
  """A finished command, as subprocess.CompletedProcess."""

  returncode: int
  stdout: str
  stderr: str


class Command:
  """A running command: `python -m MODULE ARGUMENTS` in a folder.

  Attributes:
    pid: of the process.
  """

  def __init__(
    self,
    module: str,
    *arguments: str,
    stdout: pathlib.Path,
    stderr: pathlib.Path | None = None,
    cwd: pathlib.Path = ROOT,
    env: Mapping[str, str] | None = None,
  ):
    """Starts the command; without `stderr`, both outputs go to `stdout`."""
    paths = (str(stdout), str(stderr or stdout))
    target = (module, arguments, paths, str(cwd), dict(env or {}))
    self._process = _CONTEXT.Process(target=_run, args=target)
    self._process.start()
    self.pid = self._process.pid

  def poll(self) -> int | None:
    """The exit status; None while it runs."""
    return self._process.exitcode

  def wait(self, timeout: float = TIMEOUT) -> int:
    """Waits for the exit status; negative for a signal."""
    self._process.join(timeout)
    if self._process.exitcode is None:
      self.kill()
      raise TimeoutError(f'the command did not end within {timeout:.0f} s')
    return self._process.exitcode

  def send(self, number: int) -> None:
    """Sends a signal."""
    os.kill(self.pid, number)

  def kill(self) -> None:
    """Kills the command if it is still running."""
    if self._process.exitcode is None:
      self._process.kill()
      self._process.join()


def run(module: str, *arguments: str, cwd: pathlib.Path = ROOT) -> Done:
  """Runs `python -m MODULE ARGUMENTS` and waits for its end."""
  with tempfile.TemporaryDirectory() as folder:
    out, err = (pathlib.Path(folder) / name for name in ('stdout', 'stderr'))
    returncode = Command(module, *arguments, stdout=out, stderr=err, cwd=cwd).wait()
    return Done(returncode, out.read_text(), err.read_text())


def _run(
  module: str, arguments: tuple[str, ...], outputs: tuple[str, str], cwd: str, env: dict[str, str]
) -> None:
  """Body of the forked process."""
  append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
  for descriptor, path in enumerate(outputs, start=1):
    os.dup2(os.open(path, append), descriptor)
  os.environ.update(env)
  os.chdir(cwd)
  sys.argv = [module, *arguments]
  sys.path.insert(0, str(ROOT))
  runpy.run_module(module, run_name='__main__', alter_sys=True)
