"""The command: flags, what it prints, and mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from vpe_jax.config import DataConfig
from vpe_jax.data.sources import open_source


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """20 pictures in a folder of their class, one of which is none."""
  folder = tmp_path_factory.mktemp('in')
  (folder / 'cat').mkdir()
  lines = []
  for number in range(20):
    Image.new('RGB', (20, 10), (number, 0, 0)).save(folder / 'cat' / f'{number:02d}.png')
    line = {'file': f'cat/{number:02d}.png', 'words': f'cat {number}', 'language': 'en'}
    lines.append(json.dumps(line | ({'language': 'zh'} if number > 14 else {})))
  (folder / 'cat' / '07.png').write_bytes(b'none')
  (folder / 'captions.jsonl').write_text('\n'.join(lines))
  return folder


def _run(*arguments):
  command = [sys.executable, '-m', 'vpe_jax.prepare', *arguments]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_is_prepared_verified_and_trained_on(pictures, tmp_path):
  to = tmp_path / 'to'
  command = [f'--source=folder:{pictures}', f'--to={to}', '--caption=words', '--language=en']
  command += ['--shard_records=8', '--max_skipped=0.05', '--workers=0']
  done = _run(*command)
  assert done.returncode == 0, done.stderr
  said = done.stdout.splitlines()
  assert said[0].startswith(f'{to}: 14 pictures in 2 files, ') and said[0].endswith(' MB')
  assert said[1] == '5 were left out by --language and --least_text_height'
  assert said[2] == f'1 could not be used: see {to}/skipped.jsonl'
  assert 'preparing: 100%' in done.stderr or '20picture' in done.stderr
  again = _run(*command)
  first, *rest = again.stdout.splitlines()
  assert rest.pop(0).startswith('It was whole already, and its source was not read')
  assert (again.returncode, [first, *rest]) == (0, said)
  source = open_source(DataConfig(source=f'folder:{to}', language='en'))
  assert len(source) == 14 and (source[13].caption, source[13].group) == ('cat 14', 'cat')

  good = _run('--verify', f'--to={to}')
  assert (good.returncode, good.stdout) == (0, f'{to}: 2 files with 14 records are good\n')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--verify'], '--to is missing'),
    (['--source=tfds:x', '--split=train', '--to={tmp}/to'], 'tfds:x/train is not in data'),
    (['--source=folder:{in}', '--to={tmp}/to', '--workers=0'], '20 of 20 pictures can not be used'),
  ],
)
def test_a_mistake_is_one_line_and_status_2(pictures, tmp_path, arguments, message):
  place = {'tmp': tmp_path, 'in': pictures}
  done = _run(*(argument.format(**place) for argument in arguments))
  assert done.returncode == 2
  lines = [line for line in done.stderr.splitlines() if line and not line.startswith('preparing')]
  assert len(lines) == 1 and lines[0].startswith('error: ' + message.format(**place))


def test_help_shows_examples_and_every_flag():
  done = _run('--help')
  assert done.returncode == 0
  for words in ('webdataset:', '--caption', '--[no]captions', '--max_skipped', '--verify'):
    assert words in done.stdout
