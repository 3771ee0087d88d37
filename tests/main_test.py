"""Tests of the training command as a real process."""

import pytest

from tests import commands


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '--config is missing: try --config=t2i'),
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
