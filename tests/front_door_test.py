"""Front doors: flags, mistakes, and folders that can't be written to."""

import errno
import functools
import pathlib
import types

import pytest
from absl import flags
from etils import epath

from tests import commands
from vpe_jax import front_door
from vpe_jax.contracts import UserError

TOY = 'tests.toy_command'


def test_flags_and_extra_arguments_reach_the_command():
  done = commands.run(TOY, '--n=3', '+x')
  assert (done.returncode, done.stdout) == (0, "3 ['+x']\n"), done.stderr
  assert 'chatter' not in done.stderr


@pytest.mark.parametrize(
  'argument, message',
  [
    ('--n=13', 'n is 13: choose another'),
    ('--n=many', 'flag --n=many'),
    ('--n=28', 'cannot write a file: No space left on device; free some space'),
    ('--n=36', 'nnn: File name too long; name another path'),
    ('--n=43', 'out of device memory: no room for 32,768.0 GiB more; use a smaller batch'),
    ('--m=1', "Unknown command line flag 'm'"),
    ('x', "unexpected argument 'x'"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(argument, message):
  done = commands.run(TOY, argument)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert message in done.stderr


@pytest.fixture
def settings(monkeypatch):
  """Reads a command line and returns the sampling settings in it."""
  values = flags.FlagValues()
  kinds = {
    'DEFINE_integer': flags.DEFINE_integer,
    'DEFINE_float': flags.DEFINE_float,
    'DEFINE_bool': flags.DEFINE_bool,
  }
  own = {name: functools.partial(define, flag_values=values) for name, define in kinds.items()}
  monkeypatch.setattr(front_door, 'flags', types.SimpleNamespace(FLAGS=values, **own))
  own['DEFINE_integer']('steps', 7, 'of the command')
  front_door.define_settings()

  def read(*args):
    values(['command', *args])
    return front_door.settings()

  read.flags = values
  return read


def test_each_setting_has_a_flag_with_and_without_prefix(settings):
  assert settings('--guidance=2', '--sample.top_k=5') == {'guidance': 2.0, 'top_k': 5}
  assert 'guidance scale' in settings.flags['image_guidance'].help


def test_a_setting_with_the_name_of_a_command_flag_needs_its_prefix(settings):
  assert settings('--steps=3') == {}
  assert settings('--sample.steps=4') == {'steps': 4}


def test_two_values_of_one_setting_are_an_error(settings):
  assert settings('--guidance=2', '--sample.guidance=2') == {'guidance': 2.0}
  with pytest.raises(UserError, match='--guidance=2.0 and --sample.guidance=3.0 are the same'):
    settings('--guidance=2', '--sample.guidance=3')


def test_checking_a_folder_changes_nothing(tmp_path):
  front_door.check_folder(str(tmp_path / 'new' / 'deep'))
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('old')
  with pytest.raises(UserError, match='cannot write to .*file/new'):
    front_door.check_folder(str(tmp_path / 'file' / 'new'))
  with pytest.raises(UserError, match='cannot write to .*file'):
    front_door.check_folder(str(tmp_path / 'file'))


def test_output_paths_may_begin_with_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert front_door.output_path('out', '~/x.png') == f'{tmp_path}/x.png'
  assert front_door.output_path('out', '~/x/') == f'{tmp_path}/x/'
  assert front_door.output_path('out', 'gs://bucket/x/') == 'gs://bucket/x/'
  with pytest.raises(UserError, match='--out is empty'):
    front_door.output_path('out', '')


def test_an_output_file_is_checked_before_the_work(tmp_path):
  file = tmp_path / 'x.json'
  assert front_door.new_file('json', str(file), False) == str(file) and not file.exists()
  file.write_text('old')
  assert front_door.new_file('json', str(file), True) == str(file)
  for path, message in (
    (str(file), 'exists: .*--overwrite'),
    (str(tmp_path), 'is a folder: name a file'),
    (f'{tmp_path}/new/', 'is a folder: name a file'),
    (f'{file}/x', 'cannot write to'),
    ('', '--json is empty'),
  ):
    with pytest.raises(UserError, match=message):
      front_door.new_file('json', path, False)
  assert file.read_text() == 'old'


def test_an_error_names_the_current_folder(monkeypatch):
  def refuse(*_):
    raise PermissionError(errno.EACCES, 'Permission denied')

  monkeypatch.setattr(epath.Path, 'write_bytes', refuse)
  monkeypatch.setattr(pathlib.Path, 'write_bytes', refuse)
  with pytest.raises(UserError, match=r'cannot write to \.: Permission denied'):
    front_door.new_file('json', 'x.json', False)


def test_an_unreachable_folder_is_a_one_line_error():
  for folder in ('s3://bucket/x', 'https://host/x'):
    with pytest.raises(UserError, match='out of reach'):
      front_door.check_folder(folder)
