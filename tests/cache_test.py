"""The command that lists and cleans the cache of encoded images."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from tests.outcomes import refusal_of
from vpe_jax import cache as command
from vpe_jax.contracts import UserError
from vpe_jax.data import cache


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
  """Runs the command with a value of --clean; returns its output."""
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path))

  def run(clean=None):
    monkeypatch.setattr(command, 'FLAGS', types.SimpleNamespace(clean=clean))
    command.main()
    return capsys.readouterr().out

  return run


def _write(source, complete=True):
  def batches(start):
    yield {'codes': np.zeros((4, 2))}
    if not complete:
      raise RuntimeError('interrupted')

  fingerprint = json.dumps({'data': {'source': source}})
  try:
    cache.write_cache(fingerprint, batches, 2)
  except RuntimeError:
    assert not complete
  return cache.location(fingerprint)


def test_caches_are_listed_and_deleted(run, tmp_path):
  assert '0 caches' in run()
  whole, part, other = _write('folder:a'), _write('folder:b', complete=False), _write('scenes')
  (tmp_path / 'encoded' / 'x.part1').mkdir()  # left by an earlier version
  lines = {line.split()[0]: line for line in run().splitlines()}
  assert 'folder:a' in lines[whole.name] and 'unfinished' not in lines[whole.name]
  assert 'unfinished  folder:b' in lines[part.name] and ' 4 images' in lines[part.name]
  assert '4 caches' in run()
  assert run(['unfinished']).count('deleted') == 2
  assert run([other.name]).startswith(f'deleted {other.name}')
  assert [path.name for path in (tmp_path / 'encoded').iterdir()] == [whole.name]
  with pytest.raises(UserError, match='--clean=.*no such cache'):
    run([other.name])
  assert '--clean is empty' in refusal_of(run, [])
  assert whole.name in run(['all']) and '0 caches' in run()
