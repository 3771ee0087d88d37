"""Tests of the training command as a real process."""

import types

import pytest

from tests import commands
from vpe_jax import main


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '--config is missing: try --config=t2i'),
    (['--workdir=runs/typo'], '--config is missing: runs/typo has no run to continue; try'),
    (['--config=configs/t2i.py:debgu'], "unknown preset 'debgu'; did you mean 'debug'?"),
    (['--config=configs/t2i.py', '--config.optim.lrr=1'], "did you mean 'lr'?"),
    (['--config=configs/t2i.py', 'extra'], "unexpected argument 'extra'"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
  done = commands.run('vpe_jax.main', *arguments)
  assert done.returncode == 2
  assert message in done.stderr and 'Traceback' not in done.stderr
  assert len([line for line in done.stderr.splitlines() if line.startswith('error: ')]) == 1


def test_help_has_examples():
  done = commands.run('vpe_jax.main', '--help')
  assert done.returncode == 0
  assert 'python -m vpe_jax.main --config=configs/t2i.py' in done.stdout


def test_compiled_programs_are_saved_with_the_run(monkeypatch, tmp_path):
  calls, workdir = [], str(tmp_path / 'run')
  values = {'config': 'configs/t2i.py:debug', 'workdir': workdir, 'allow_change': []}
  monkeypatch.setattr(main, 'FLAGS', types.SimpleNamespace(**values))
  monkeypatch.setattr(main.front_door, 'require_flags', lambda *_, **__: None)
  monkeypatch.setattr(main.sharding, 'initialize_distributed', lambda: None)
  monkeypatch.setattr(main.devices, 'disable_optimizations', lambda: None)
  use = lambda folder: calls.append(str(folder))
  monkeypatch.setattr(main.devices, 'use_compilation_cache', use)
  run = lambda chain, folder, _: calls.append((list(chain), folder)) or True
  monkeypatch.setattr(main.runs, 'run_chain', run)
  main.main()
  assert calls == [f'{workdir}/compilation_cache', ([''], workdir)]
