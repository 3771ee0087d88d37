"""Preparing: what is kept and skipped, in which order, and how a call goes on that was stopped."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data import preparing
from vpe_jax.data.preparing import Settings, prepare
from vpe_jax.data.sources import open_source


def _folder(path, count=10, **fields):
  """Pictures with captions.jsonl; `fields` are functions of the number."""
  path.mkdir(exist_ok=True)
  lines = []
  for number in range(count):
    Image.new('RGB', (40, 20), (number, 0, 0)).save(path / f'{number:03d}.png')
    line = {'file': f'{number:03d}.png', 'caption': f'caption {number}'}
    lines.append(json.dumps(line | {name: make(number) for name, make in fields.items()}))
  (path / 'captions.jsonl').write_text('\n'.join(lines))
  return f'folder:{path}'


def _captions(to, **fields):
  source = open_source(DataConfig(source=f'folder:{to}', **fields))
  return [source[index].caption for index in range(len(source))]


def _numbers(numbers):
  return [f'caption {number}' for number in numbers]


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def _skipped(to):
  return [json.loads(line) for line in (to / 'skipped.jsonl').read_text().splitlines()]


def test_processes_write_what_one_alone_writes(tmp_path):
  source = _folder(tmp_path / 'in', 10)
  one = prepare(Settings(source, shard_records=3), str(tmp_path / 'one'))
  two = prepare(Settings(source, shard_records=3), str(tmp_path / 'two'), workers=2)
  assert one == two and one.count == 10 and len(one.shards) == 4
  assert _names(tmp_path / 'one') == _names(tmp_path / 'two')
  for name in _names(tmp_path / 'one'):
    assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()
  assert _captions(tmp_path / 'two') == _numbers(range(10))


def test_filters_keep_what_they_keep_of_the_folder(tmp_path):
  """And are stated: the prepared folder is for configs that ask for the same."""
  source = _folder(
    tmp_path / 'in',
    12,
    language=lambda number: 'zh' if number in (0, 1, 2, 7) else 'en',
    texts=lambda number: [{'text': 'x', 'box': [0, 0, 9, number]}],
  )
  fields = {'language': 'en', 'least_text_height': 2, 'image_size': 16}
  made = prepare(Settings(source, shard_records=3, **fields), str(tmp_path / 'to'))
  kept = _captions(tmp_path / 'in', **fields)
  assert kept == _numbers([5, 6, 8, 9, 10, 11]) == _captions(tmp_path / 'to', **fields)
  assert (made.count, made.left_out, len(made.shards)) == (6, 6, 3)  # Nothing of the first three.
  for other in ({}, fields | {'fit': 'crop'}, fields | {'image_size': 32}):
    with pytest.raises(UserError, match='was prepared with'):
      _captions(tmp_path / 'to', **other)


def test_the_first_so_many(tmp_path):
  source = _folder(tmp_path / 'in', 7)
  assert prepare(Settings(source, count=5, shard_records=2), str(tmp_path / 'to')).count == 5
  assert _captions(tmp_path / 'to') == _numbers(range(5))


def test_what_cannot_be_used_is_skipped_and_listed(tmp_path):
  long = preparing._LONGEST + 1
  source = _folder(
    tmp_path / 'in', 60, caption=lambda number: 'x' * long if number == 7 else f'caption {number}'
  )
  (tmp_path / 'in' / '001.png').unlink()
  whole = (tmp_path / 'in' / '002.png').read_bytes()
  (tmp_path / 'in' / '002.png').write_bytes(whole[: len(whole) // 2])
  with (tmp_path / 'in' / 'captions.jsonl').open('a') as file:
    for name in ('\ud800.png', 'x' * 5000 + '.png'):
      file.write('\n' + json.dumps({'file': name, 'caption': 'a name that no file has'}))
  settings = Settings(source, shard_records=16)
  with pytest.raises(
    UserError, match='[1-9] of [1-9][0-9] pictures can not be used, more than --max_skipped=0.01'
  ) as error:
    prepare(settings, str(tmp_path / 'to'))
  assert 'folder/001.png: ' in str(error.value) and 'skipped.jsonl' in str(error.value)
  assert not (tmp_path / 'to' / 'prepared.json').exists()
  made = prepare(settings, str(tmp_path / 'to'), max_skipped=0.1)
  assert (made.count, made.skipped) == (57, 5)
  assert _captions(tmp_path / 'to') == _numbers(n for n in range(60) if n not in (1, 2, 7))
  listed = _skipped(tmp_path / 'to')
  assert len(listed) == 5 and listed[0]['id'] == 'folder/001.png'
  assert 'No such file' in listed[0]['reason'] and 'unreadable image' in listed[1]['reason']
  assert f'{long:,} letters' in listed[2]['reason']


def test_a_mistake_in_the_flags_ends_it_at_the_first_shard(tmp_path):
  source = _folder(tmp_path / 'in', 9)
  for name in range(3):
    (tmp_path / 'in' / f'{name:03d}.png').write_bytes(b'none')
  with pytest.raises(UserError, match='3 of 3 pictures can not be used'):
    prepare(Settings(source, shard_records=3), str(tmp_path / 'to'), max_skipped=0.5)
  assert prepare(Settings(source, shard_records=3), str(tmp_path / 'to'), 0, 1.0).count == 6


@pytest.mark.parametrize('what', ['nothing', 'no lines', 'all left out'])
def test_a_set_without_pictures_is_an_error(tmp_path, what):
  source = _folder(tmp_path / 'in', 2 if what == 'all left out' else 0)
  if what == 'nothing':
    (tmp_path / 'in' / 'captions.jsonl').unlink()
  language = 'en' if what != 'all left out' else 'de'
  message = 'has 0 pictures$' if what != 'all left out' else '2 of 2 .*no "language"'
  with pytest.raises(UserError, match=message):
    prepare(Settings(source, language=language), str(tmp_path / 'to'))
  if what == 'all left out':
    source = _folder(tmp_path / 'in', 2, language=lambda _: 'en')
    with pytest.raises(UserError, match='has 2 pictures: none passes --language'):
      prepare(Settings(source, language='de'), str(tmp_path / 'again'))


def test_a_call_goes_on_where_it_was(tmp_path, monkeypatch):
  """Whole shards stay as they are; what was begun, or has changed since, is written."""
  source = _folder(tmp_path / 'in', 10)
  settings = Settings(source, shard_records=2)
  to = tmp_path / 'to'
  real, written = preparing._write_shard, []

  def stopped(*arguments):
    if len(written) == 3:
      raise KeyboardInterrupt
    written.append(arguments[3])
    return real(*arguments)

  monkeypatch.setattr(preparing, '_write_shard', stopped)
  with pytest.raises(KeyboardInterrupt):
    prepare(settings, str(to))
  assert written == [0, 1, 2] and not (to / 'prepared.json').exists()
  with pytest.raises(UserError, match='does not exist|has no images|no caption'):
    _captions(to)  # Nothing reads what isn't whole.
  (to / 'pictures-00001.array_record').write_bytes(b'cut')
  (to / 'preparing' / '00002.json').write_text('{')
  monkeypatch.setattr(
    preparing, '_write_shard', lambda *arguments: written.append(arguments[3]) or real(*arguments)
  )
  made = prepare(settings, str(to))
  assert written[3:] == [1, 2, 3, 4]
  assert _captions(to) == _numbers(range(10))
  assert _names(to) == [f'pictures-{n:05d}.array_record' for n in range(5)] + ['prepared.json']
  assert prepare(settings, str(to)) == made and len(written) == 7


def test_pictures_that_were_added_since_are_in_it(tmp_path):
  source = _folder(tmp_path / 'in', 5)
  settings = Settings(source, shard_records=2)
  (tmp_path / 'in' / '004.png').unlink()
  with pytest.raises(UserError, match='1 of 5'):
    prepare(settings, str(tmp_path / 'to'))
  _folder(tmp_path / 'in', 6)
  assert prepare(settings, str(tmp_path / 'to')).count == 6
  assert not (tmp_path / 'to' / 'skipped.jsonl').exists()


@pytest.mark.slow
def test_a_killed_process_is_no_loss(tmp_path):
  """The command and its processes are killed between shards, then called again."""
  _folder(tmp_path / 'in', 300)
  command = [sys.executable, '-m', 'vpe_jax.prepare', f'--source=folder:{tmp_path}/in']
  command += [f'--to={tmp_path}/to', '--shard_records=2', '--workers=1']
  first = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
  notes = tmp_path / 'to' / 'preparing'
  while not (notes / '00003.json').exists():
    assert first.poll() is None
    time.sleep(0.01)
  os.killpg(first.pid, signal.SIGKILL)
  first.wait()
  kept = tmp_path / 'to' / 'pictures-00000.array_record'
  date = kept.stat().st_mtime_ns
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert '300 pictures in 150 files' in done.stdout
  assert kept.stat().st_mtime_ns == date
  assert _captions(tmp_path / 'to') == _numbers(range(300))
  assert not notes.exists()


def test_other_settings_or_files_in_the_folder_are_refused(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  to = tmp_path / 'to'
  prepare(Settings(source), str(to))
  with pytest.raises(UserError, match=r'to was begun with other settings \(count=0, now 1\)'):
    prepare(Settings(source, count=1), str(to))
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'x.txt').write_text('mine')
  for place in ('mine', 'in'):
    with pytest.raises(UserError, match='has files that are not of this command'):
      prepare(Settings(source), str(tmp_path / place))
  assert _names(tmp_path / 'mine') == ['x.txt']
  with pytest.raises(UserError, match='cannot write .*x.txt'):
    prepare(Settings(source), str(tmp_path / 'mine' / 'x.txt'))
  with pytest.raises(UserError, match='is prepared already: config.data.source=folder:'):
    prepare(Settings(f'folder:{to}'), str(tmp_path / 'again'))


def test_a_mistake_before_the_first_picture_leaves_the_folder_free(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  with pytest.raises(UserError, match=r'2 of 2 .* line 1 has no caption .--caption='):
    prepare(Settings(source, caption='words'), str(tmp_path / 'to'))
  assert len((tmp_path / 'to' / 'preparing' / 'skipped.jsonl').read_text().splitlines()) == 2
  assert prepare(Settings(source), str(tmp_path / 'to')).count == 2
  assert _names(tmp_path / 'to') == ['pictures-00000.array_record', 'prepared.json']


def test_a_list_of_the_users_own_is_not_touched(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  (tmp_path / 'to').mkdir()
  (tmp_path / 'to' / 'skipped.jsonl').write_text('mine')
  with pytest.raises(UserError, match='has files that are not of this command'):
    prepare(Settings(source), str(tmp_path / 'to'))
  assert (tmp_path / 'to' / 'skipped.jsonl').read_text() == 'mine'


def test_a_picture_without_a_caption_is_left_out_and_listed(tmp_path):
  source = _folder(tmp_path / 'in', 4)
  lines = (tmp_path / 'in' / 'captions.jsonl').read_text().splitlines()
  lines[1], lines[2] = (
    '{"file": "001.png", "caption": " "}',
    r'{"file": "002.png", "text": "\ud800"}',
  )
  (tmp_path / 'in' / 'captions.jsonl').write_text('\n'.join(lines))
  assert prepare(Settings(source), str(tmp_path / 'to'), max_skipped=0.5).count == 2
  blank, broken = _skipped(tmp_path / 'to')
  assert 'line 2 has no caption' in blank['reason'] and '--nocaptions' in blank['reason']
  assert 'line 3: the caption is not valid text' in broken['reason']


def test_settings_of_an_unfinished_folder_hold_too(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  (tmp_path / 'in' / '001.png').unlink()
  with pytest.raises(UserError, match='1 of 2'):
    prepare(Settings(source), str(tmp_path / 'to'))
  with pytest.raises(UserError, match="other settings .caption='', now 'text'"):
    prepare(Settings(source, caption='text'), str(tmp_path / 'to'), max_skipped=1.0)
  (tmp_path / 'to' / 'preparing' / 'settings.json').write_text('{')
  with pytest.raises(UserError, match='settings.json can not be read'):
    prepare(Settings(source), str(tmp_path / 'to'), max_skipped=1.0)


def test_two_calls_do_not_write_to_one_folder(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  work = preparing._claim(tmp_path / 'to', Settings(source))
  with (work / 'settings.json').open('rb') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='another call is writing to'):
      prepare(Settings(source), str(tmp_path / 'to'))
  assert prepare(Settings(source), str(tmp_path / 'to')).count == 2


@pytest.mark.parametrize(
  'source, message',
  [
    ('pictures', 'write folder:, webdataset:, parquet:, tfds: and where'),
    ('foldr:x', "did you mean 'folder:'"),
    ('folder:', '--source=folder:: write folder:'),
    ('folder:/nowhere', 'does not exist'),
    ('folder:gs://bucket/x', 'object store.*gcsfuse'),
    ('webdataset:/nowhere/*.tar', 'names no files'),
    ('parquet:gs://bucket/*', 'object store'),
  ],
)
def test_sources_that_are_none(tmp_path, source, message):
  with pytest.raises(UserError, match=message) as error:
    prepare(Settings(source), str(tmp_path / 'to'))
  assert '\n' not in str(error.value)


def test_processes_of_the_pool_end_with_the_first(tmp_path):
  """Where it is killed: else each retry would leave as many behind."""
  first = """
import multiprocessing, os, sys, time
from vpe_jax.data.preparing import _end_with
def stay(first):
  _end_with(first)
  print('there', flush=True)
  time.sleep(600)
if __name__ == '__main__':
  multiprocessing.get_context('fork').Process(target=stay, args=(os.getpid(),)).start()
  time.sleep(600)
"""
  with subprocess.Popen(
    [sys.executable, '-c', first], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'there\n'
    process.kill()
    # Both hold the pipe: it ends when both have.
    assert process.stdout.read() == ''
