"""Tests of chains of runs."""

import types

import pytest

from tests.outcomes import result_of
from vpe_jax.training import config_file, runs


@pytest.mark.parametrize('step, trained', [(5, ['plan', 'last']), (6, ['last'])])
@pytest.mark.parametrize('steps', ['3', '(3,)', '(3, 3)'])
def test_a_run_of_a_chain_is_complete_after_the_steps_of_all_its_stages(
  monkeypatch, step, trained, steps
):
  """One number of steps is that of each of the two stages."""
  values = config_file.load('t2i:debug', {'steps': steps})
  chain = {'plan': values, 'last': values}
  calls = []
  monkeypatch.setattr(runs, 'run', lambda config, folder, _: calls.append(folder) or True)
  monkeypatch.setattr(runs, 'build', lambda config, _: types.SimpleNamespace(config=config))
  monkeypatch.setattr(runs.resume, 'check_config', lambda *_: [])
  monkeypatch.setattr(
    runs.weights, 'newest_record', lambda folder: {'step': step, 'config': values}
  )
  assert result_of(runs.run_chain, chain, 'chain') is True
  assert calls == [f'chain/{name}' for name in trained]
