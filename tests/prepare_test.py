"""The prepare command: flags, output and mistakes."""

from __future__ import annotations

import functools
import json
import re
import types

import pytest
from absl import flags
from PIL import Image

from tests import commands
from vpe_jax import prepare
from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.sources import open_source


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """20 image files in a folder of their class, one of which is invalid."""
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


def test_a_folder_is_prepared_verified_and_opened(images, tmp_path, command, capsys):
  to = tmp_path / 'to'
  arguments = [f'--source=folder:{images}', f'--to={to}', '--caption=words', '--language=en']
  arguments += ['--shard_records=8', '--workers=0']
  failed = commands.run('vpe_jax.prepare', *arguments)
  assert failed.returncode == 2
  assert re.fullmatch(r'error: .*folder/cat/07.png.*', failed.stderr.strip().splitlines()[-1])
  command(*arguments, '--most_skipped=0.05')
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith(f'{to}: 14 images in 2 files, ') and lines[0].endswith(' MB')
  assert lines[1].startswith('5 excluded') and lines[2] == f'1 unusable: see {to}/skipped.jsonl'
  command(*arguments, '--most_skipped=0.05')
  first, note, *rest = capsys.readouterr().out.splitlines()
  assert 'already complete' in note and [first, *rest] == lines
  source = open_source(DataConfig(source=f'folder:{to}', language='en'))
  assert len(source) == 14 and (source[13].caption, source[13].group) == ('cat 14', 'cat')

  command('--verify', f'--to={to}')
  assert capsys.readouterr().out.startswith(f'{to}: 2 files with 14 records')


@pytest.fixture
def command(monkeypatch, tmp_path):
  """The command in this process, with parsed flags."""
  values = flags.FlagValues()
  with monkeypatch.context() as patch:
    for kind in ('string', 'bool', 'integer', 'enum', 'float'):
      define = getattr(flags, f'DEFINE_{kind}')
      patch.setattr(flags, f'DEFINE_{kind}', functools.partial(define, flag_values=values))
    prepare._define_flags()
  monkeypatch.setattr(prepare, 'FLAGS', values)
  monkeypatch.setattr(prepare.front_door, 'flags', types.SimpleNamespace(FLAGS=values))

  def run(*arguments):
    values(['prepare', *(argument.format(tmp=tmp_path) for argument in arguments)])
    prepare.main()

  return run


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--verify'], '--to'),
    (['--to={tmp}/to'], '--source'),
    (['--source=tfds:x', '--split=train', '--to={tmp}/to'], 'tfds:x/train'),
    (['--source=folder:x', '--split=train', '--to={tmp}/to'], '--split=train is for a tfds:'),
  ],
)
def test_mistakes_are_named(command, arguments, message):
  with pytest.raises(UserError, match=message):
    command(*arguments)
