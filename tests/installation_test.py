"""An installed package works in any folder: configs, weights and the console command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vpe_jax import __main__ as console

ROOT = Path(__file__).parents[1]
PARTS = ('vpe_jax', 'configs', 'third_party', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE')
BUILD = 'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])'


@pytest.fixture(scope='module')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with the unpacked wheel of this checkout."""
  folder = tmp_path_factory.mktemp('wheel')
  (folder / 'source').mkdir()
  for name in PARTS:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, folder / 'source' / name, symlinks=True)
    else:
      shutil.copy(ROOT / name, folder / 'source' / name)
  command = [sys.executable, '-c', BUILD, str(folder)]
  done = subprocess.run(command, cwd=folder / 'source', capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  (wheel,) = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / 'site')
  return folder / 'site'


def _run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, '-m', *arguments]
  env = os.environ | {'PYTHONPATH': str(installed)}
  return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_wheel_has_configs_weights_and_the_console_command(installed):
  names = {path.name for path in (installed / 'vpe_jax' / 'configs').iterdir()}
  assert names >= {path.name for path in (ROOT / 'configs').glob('*.py')}
  assert (installed / 'vpe_jax' / 'assets' / 'tiny.safetensors').stat().st_size > 1e6
  assert {path.name for path in installed.iterdir() if path.suffix != '.dist-info'} == {'vpe_jax'}
  (entries,) = installed.glob('*.dist-info/entry_points.txt')
  assert 'vpe_jax = vpe_jax.__main__:main' in entries.read_text()


@pytest.mark.parametrize(
  'arguments',
  [
    ('vpe_jax.main', '--config=configs/t2i.py:debug'),
    ('vpe_jax', 'main', '--config=t2i:debug'),
  ],
)
def test_shipped_configs_are_found_in_any_folder(installed, tmp_path, arguments):
  (tmp_path / 'configs').mkdir()  # the user's own
  (tmp_path / 'configs' / 'common.py').write_text('')
  # The config is complete up to this setting: the error is that of the config's type.
  done = _run(installed, tmp_path, *arguments, '--config.optim.lr=None')
  assert done.returncode == 2
  assert done.stderr == "error: config key 'optim.lr' must be float, not None\n"


def test_the_console_command_lists_and_suggests_commands(installed, tmp_path):
  assert all(name in _run(installed, tmp_path, 'vpe_jax').stdout for name in console.COMMANDS)
  done = _run(installed, tmp_path, 'vpe_jax', 'sampel')
  assert done.returncode == 2
  assert done.stderr == "error: there is no command 'sampel'; did you mean 'sample'?\n"


def test_every_front_door_is_a_command():
  modules = (ROOT / 'vpe_jax').glob('*.py')
  doors = {path.stem for path in modules if 'front_door.run(' in path.read_text()}
  assert doors == console.COMMANDS.keys()
