"""The core does not know VPE: with systems/vpe removed, everything else works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Tests of the core that take about half a minute, and need no system of VPE.
SUBSET = (
  'tests/contracts_test.py',
  'tests/sequence/',
  'tests/objectives/',
  'tests/evaluation/runner_test.py',
  'tests/data/pipeline_test.py',
  'tests/data/cache_test.py',
)
# One process collects all tests, imports all modules, and runs the subset.
_SCRIPT = f"""
import importlib, pkgutil, sys
import pytest

class Subset:
  def pytest_collection_modifyitems(self, items):
    import vpe_jax
    from vpe_jax import systems
    for module in pkgutil.walk_packages(vpe_jax.__path__, 'vpe_jax.'):
      importlib.import_module(module.name)
    assert 'vpe' not in systems.packages() and 'siglip' in systems.known()
    for path in {SUBSET}:
      assert any(item.nodeid.startswith(path) for item in items), path
    items[:] = [item for item in items if item.nodeid.startswith({SUBSET})]

sys.exit(pytest.main(['-q', '-x', 'tests'], plugins=[Subset()]))
"""


@pytest.mark.slow
def test_everything_else_works_without_vpe(tmp_path: Path) -> None:
  for name in ('vpe_jax', 'configs', 'tests'):
    ignored = shutil.ignore_patterns('__pycache__', 'assets', 'golden')
    shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
  (tmp_path / 'vpe_jax' / 'assets').symlink_to(ROOT / 'vpe_jax' / 'assets')
  (tmp_path / 'tests' / 'golden').symlink_to(ROOT / 'tests' / 'golden')
  shutil.copy(ROOT / 'setup.cfg', tmp_path)
  for room in ('vpe_jax', 'tests'):
    shutil.rmtree(tmp_path / room / 'systems' / 'vpe')
  result = subprocess.run(
    [sys.executable, '-c', _SCRIPT],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
