"""The core does not know VPE: with systems/vpe removed, everything else works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Tests of the core that take about a minute, and need no system of VPE.
SUBSET = (
  'tests/contracts_test.py',
  'tests/sequence',
  'tests/sampling',
  'tests/objectives',
  'tests/ops/rope_test.py',
  'tests/evaluation/runner_test.py',
  'tests/data/pipeline_test.py',
  'tests/data/cache_test.py',
)
_IMPORT_ALL = """
import importlib, pkgutil, vpe_jax
for module in pkgutil.walk_packages(vpe_jax.__path__, 'vpe_jax.'):
  importlib.import_module(module.name)
from vpe_jax import systems
assert 'vpe' not in systems.packages() and 'siglip' in systems.known()
"""


@pytest.mark.slow
def test_everything_else_works_without_vpe(tmp_path: Path) -> None:
  for name in ('vpe_jax', 'configs', 'tests'):
    ignored = shutil.ignore_patterns('__pycache__', 'assets', 'golden')
    shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
  (tmp_path / 'vpe_jax' / 'assets').symlink_to(ROOT / 'vpe_jax' / 'assets')
  (tmp_path / 'tests' / 'golden').symlink_to(ROOT / 'tests' / 'golden')
  shutil.copy(ROOT / 'setup.cfg', tmp_path)
  for root in ('vpe_jax', 'tests'):
    shutil.rmtree(tmp_path / root / 'systems' / 'vpe')
  environment = os.environ | {'PYTHONPATH': str(tmp_path)}
  run = lambda *arguments: subprocess.run(
    [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  imported = run('-c', _IMPORT_ALL)
  assert imported.returncode == 0, imported.stderr
  collected = run('-m', 'pytest', '--collect-only', '-q', 'tests')
  assert collected.returncode == 0, collected.stdout[-2000:]
  present = [path for path in SUBSET if (tmp_path / path).exists()]
  assert len(present) == len(SUBSET), f'missing: {set(SUBSET) - set(present)}'
  passed = run('-m', 'pytest', '-q', '-x', *present)
  assert passed.returncode == 0, passed.stdout[-2000:]
