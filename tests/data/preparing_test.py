"""Preparing: order, filters, unusable records, and how an interrupted command continues."""

from __future__ import annotations

import dataclasses
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
from vpe_jax.data.formats.entries import MAX_CAPTION
from vpe_jax.data.preparing import Settings, prepare
from vpe_jax.data.sources import open_source


def _folder(path, count=10, **fields):
  """Images with a captions.jsonl; `fields` maps names to functions of the index."""
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


def test_output_does_not_depend_on_the_number_of_processes(tmp_path):
  source = _folder(tmp_path / 'in', 10)
  one = prepare(Settings(source, shard_records=3), str(tmp_path / 'one'))
  two = prepare(Settings(source, shard_records=3), str(tmp_path / 'two'), workers=2)
  assert one == two and one.count == 10 and len(one.shards) == 4
  assert _names(tmp_path / 'one') == _names(tmp_path / 'two')
  for name in _names(tmp_path / 'one'):
    assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()
  assert _captions(tmp_path / 'two') == _numbers(range(10))


def test_filters_select_the_same_records_as_in_the_folder(tmp_path):
  """The prepared folder can be opened only with the same filters."""
  source = _folder(
    tmp_path / 'in',
    12,
    language=lambda number: 'zh' if number in (0, 1, 2, 7) else 'en',
    texts=lambda number: [{'text': 'x', 'box': [0, 0, 9, number]}],
  )
  fields = {'language': 'en', 'least_text_height': 2, 'image_size': 16}
  manifest = prepare(Settings(source, shard_records=3, **fields), str(tmp_path / 'to'))
  expected = _captions(tmp_path / 'in', **fields)
  assert expected == _numbers([5, 6, 8, 9, 10, 11]) == _captions(tmp_path / 'to', **fields)
  assert (manifest.count, manifest.left_out, len(manifest.shards)) == (
    6,
    6,
    3,
  )  # The first three all fail the filter.
  for other in ({}, fields | {'fit': 'crop'}, fields | {'image_size': 32}):
    with pytest.raises(UserError, match='was prepared with'):
      _captions(tmp_path / 'to', **other)


def test_lists_of_captions_are_kept(tmp_path):
  """Filters read all captions, and the prepared folder has the same ones as the folder."""
  texts = [['a fox', 'a red fox'], ['a dog'], ['a cat', '猫'], 'a bird']
  source = _folder(tmp_path / 'in', 4, caption=lambda number: texts[number])
  prepare(Settings(source, language='en'), str(tmp_path / 'to'))
  expected = [('a fox', ('a fox', 'a red fox')), ('a dog', ()), ('a bird', ())]
  for name in ('in', 'to'):
    records = open_source(DataConfig(source=f'folder:{tmp_path / name}', language='en'))
    assert [(record.caption, record.captions) for record in records] == expected


def test_images_above_the_limits_are_unusable(tmp_path):
  source = _folder(tmp_path / 'in', 4)  # 40 x 20 pixels
  assert prepare(Settings(source, most_pixels=800), str(tmp_path / 'to')).count == 4
  size = (tmp_path / 'in' / '000.png').stat().st_size
  for settings, message in (
    (Settings(source, most_pixels=799), '40 x 20 pixels'),
    (Settings(source, most_bytes=size - 1), 'bytes, more than most_bytes'),
  ):
    with pytest.raises(UserError, match=f'4 of 4 images are unusable.*{message}'):
      prepare(settings, str(tmp_path / 'other'))


def test_a_folder_of_an_earlier_version_has_the_defaults_of_new_settings(tmp_path):
  settings, to = Settings(_folder(tmp_path / 'in', 2)), tmp_path / 'to'
  manifest = prepare(settings, str(to))
  values = json.loads((to / 'prepared.json').read_text())
  del values['settings']['most_pixels']
  (to / 'prepared.json').write_text(json.dumps(values))
  assert prepare(settings, str(to)).shards == manifest.shards
  with pytest.raises(UserError, match='most_pixels=67108864, now 5'):
    prepare(dataclasses.replace(settings, most_pixels=5), str(to))


def test_count_takes_the_first_images(tmp_path):
  source = _folder(tmp_path / 'in', 7)
  assert prepare(Settings(source, count=5, shard_records=2), str(tmp_path / 'to')).count == 5
  assert _captions(tmp_path / 'to') == _numbers(range(5))


def test_unusable_images_are_listed(tmp_path):
  length = MAX_CAPTION + 1
  source = _folder(
    tmp_path / 'in', 60, caption=lambda number: 'x' * length if number == 7 else f'caption {number}'
  )
  (tmp_path / 'in' / '001.png').unlink()
  whole = (tmp_path / 'in' / '002.png').read_bytes()
  (tmp_path / 'in' / '002.png').write_bytes(whole[: len(whole) // 2])
  with (tmp_path / 'in' / 'captions.jsonl').open('a') as file:
    for name in ('\ud800.png', 'x' * 5000 + '.png'):
      file.write('\n' + json.dumps({'file': name, 'caption': 'a name that no file has'}))
  settings = Settings(source, shard_records=16)
  with pytest.raises(
    UserError, match='[1-9] of [1-9][0-9] images are unusable.*--most_skipped=0.01'
  ) as error:
    prepare(settings, str(tmp_path / 'to'))
  # Sorted by line as text, before the images.
  assert 'captions.jsonl line 61: ' in str(error.value) and 'skipped.jsonl' in str(error.value)
  assert len(str(error.value)) < 600  # The caption is cut.
  assert not (tmp_path / 'to' / 'prepared.json').exists()
  manifest = prepare(settings, str(tmp_path / 'to'), most_skipped=0.1)
  assert (manifest.count, manifest.skipped) == (57, 5)
  assert _captions(tmp_path / 'to') == _numbers(n for n in range(60) if n not in (1, 2, 7))
  skipped = _skipped(tmp_path / 'to')
  assert len(skipped) == 5 and skipped[2]['id'] == 'folder/001.png'
  assert f'{length:,} characters' in skipped[1]['reason']
  assert 'No such file' in skipped[2]['reason'] and 'unreadable image' in skipped[3]['reason']


def test_a_first_shard_without_usable_images_ends_the_command(tmp_path):
  source = _folder(tmp_path / 'in', 9)
  for name in range(3):
    (tmp_path / 'in' / f'{name:03d}.png').write_bytes(b'none')
  with pytest.raises(UserError, match='3 of 3 images'):
    prepare(Settings(source, shard_records=3), str(tmp_path / 'to'), most_skipped=0.5)
  assert prepare(Settings(source, shard_records=3), str(tmp_path / 'to'), 0, 1.0).count == 6


def test_a_source_without_usable_images_is_an_error(tmp_path):
  def check(source, language, message):
    with pytest.raises(UserError, match=message):
      prepare(Settings(source, language=language), str(tmp_path / 'to'))

  source = _folder(tmp_path / 'in', 0)
  check(source, 'en', 'has 0 images$')
  (tmp_path / 'in' / 'captions.jsonl').unlink()
  check(source, 'en', 'has 0 images$')
  check(_folder(tmp_path / 'in', 2), 'de', '2 of 2 .*no "language"')
  with pytest.raises(UserError, match='has 2 images: none is usable; the first: .*no "language"'):
    prepare(Settings(_folder(tmp_path / 'in', 2), language='de'), str(tmp_path / 'to'), 0, 1.0)
  check(_folder(tmp_path / 'in', 2, language=lambda _: 'en'), 'de', 'has 2 images: .*--language')


def test_an_interrupted_command_continues(tmp_path, monkeypatch):
  """Complete shards stay; unfinished and damaged ones are written again."""
  source = _folder(tmp_path / 'in', 10)
  settings = Settings(source, shard_records=2)
  to = tmp_path / 'to'
  real, written = preparing._write_shard, []

  def interrupt(*arguments):
    if len(written) == 3:
      raise KeyboardInterrupt
    written.append(arguments[3])
    return real(*arguments)

  monkeypatch.setattr(preparing, '_write_shard', interrupt)
  with pytest.raises(KeyboardInterrupt):
    prepare(settings, str(to))
  assert written == [0, 1, 2] and not (to / 'prepared.json').exists()
  with pytest.raises(UserError, match='does not exist|has no images|no caption'):
    _captions(to)  # Unfinished folders can't be read.
  (to / 'images-00001.array_record').write_bytes(b'truncated')
  (to / 'preparing' / '00002.json').write_text('{')
  monkeypatch.setattr(
    preparing, '_write_shard', lambda *arguments: written.append(arguments[3]) or real(*arguments)
  )
  manifest = prepare(settings, str(to))
  assert written[3:] == [1, 2, 3, 4]
  assert _captions(to) == _numbers(range(10))
  assert _names(to) == [
    'hashes.u64',
    *(f'images-{n:05d}.array_record' for n in range(5)),
    'prepared.json',
  ]
  assert prepare(settings, str(to)) == manifest and len(written) == 7


def test_new_images_are_read_when_the_command_is_repeated(tmp_path):
  source = _folder(tmp_path / 'in', 5)
  settings = Settings(source, shard_records=2)
  (tmp_path / 'in' / '004.png').unlink()
  with pytest.raises(UserError, match='1 of 5'):
    prepare(settings, str(tmp_path / 'to'))
  _folder(tmp_path / 'in', 6)
  assert prepare(settings, str(tmp_path / 'to')).count == 6
  assert not (tmp_path / 'to' / 'skipped.jsonl').exists()


@pytest.mark.slow
def test_a_killed_command_continues(tmp_path):
  """The command and its processes are killed between shards, then started again."""
  _folder(tmp_path / 'in', 300)
  command = [sys.executable, '-m', 'vpe_jax.prepare', f'--source=folder:{tmp_path}/in']
  command += [f'--to={tmp_path}/to', '--shard_records=2', '--workers=1']
  first = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
  summaries = tmp_path / 'to' / 'preparing'
  while not (summaries / '00003.json').exists():
    assert first.poll() is None
    time.sleep(0.01)
  os.killpg(first.pid, signal.SIGKILL)
  first.wait()
  shard = tmp_path / 'to' / 'images-00000.array_record'
  date = shard.stat().st_mtime_ns
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert '300 images in 150 files' in done.stdout
  assert shard.stat().st_mtime_ns == date
  assert _captions(tmp_path / 'to') == _numbers(range(300))
  assert not summaries.exists()


def test_other_settings_and_other_files_are_rejected(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  to = tmp_path / 'to'
  prepare(Settings(source), str(to))
  with pytest.raises(UserError, match=r'to .*count=0, now 1'):
    prepare(Settings(source, count=1), str(to))
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'x.txt').write_text('mine')
  (tmp_path / 'list').mkdir()
  (tmp_path / 'list' / 'skipped.jsonl').write_text('mine')  # not written by the command
  for name in ('mine', 'in', 'list'):
    with pytest.raises(UserError, match=f'{name} has files'):
      prepare(Settings(source), str(tmp_path / name))
  assert _names(tmp_path / 'mine') == ['x.txt']
  assert (tmp_path / 'list' / 'skipped.jsonl').read_text() == 'mine'
  with pytest.raises(UserError, match='cannot write .*x.txt'):
    prepare(Settings(source), str(tmp_path / 'mine' / 'x.txt'))
  with pytest.raises(UserError, match='already prepared'):
    prepare(Settings(f'folder:{to}'), str(tmp_path / 'again'))


def test_an_error_before_the_first_shard_allows_other_settings(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  with pytest.raises(UserError, match=r'2 of 2 .* line 1 .*--caption='):
    prepare(Settings(source, caption='words'), str(tmp_path / 'to'))
  assert len((tmp_path / 'to' / 'preparing' / 'skipped.jsonl').read_text().splitlines()) == 2
  assert prepare(Settings(source), str(tmp_path / 'to')).count == 2
  assert _names(tmp_path / 'to') == ['hashes.u64', 'images-00000.array_record', 'prepared.json']


def test_images_without_a_valid_caption_are_unusable(tmp_path):
  source = _folder(tmp_path / 'in', 4)
  lines = (tmp_path / 'in' / 'captions.jsonl').read_text().splitlines()
  lines[1], lines[2] = (
    '{"file": "001.png", "caption": " "}',
    r'{"file": "002.png", "text": "\ud800"}',
  )
  (tmp_path / 'in' / 'captions.jsonl').write_text('\n'.join(lines))
  assert prepare(Settings(source), str(tmp_path / 'to'), most_skipped=0.5).count == 2
  broken, blank = _skipped(tmp_path / 'to')
  assert 'line 2' in blank['reason'] and '--nocaptions' in blank['reason']
  assert 'line 3: the caption is not valid text' in broken['reason']


def test_an_unfinished_folder_rejects_other_settings(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  (tmp_path / 'in' / '001.png').unlink()
  with pytest.raises(UserError, match='1 of 2'):
    prepare(Settings(source), str(tmp_path / 'to'))
  with pytest.raises(UserError, match="caption='', now 'text'"):
    prepare(Settings(source, caption='text'), str(tmp_path / 'to'), most_skipped=1.0)
  (tmp_path / 'to' / 'preparing' / 'settings.json').write_text('{')
  with pytest.raises(UserError, match='settings.json'):
    prepare(Settings(source), str(tmp_path / 'to'), most_skipped=1.0)


def test_a_second_command_on_the_same_folder_is_rejected(tmp_path):
  source = _folder(tmp_path / 'in', 2)
  work = preparing._create_work_folder(tmp_path / 'to', Settings(source))
  with (work / 'settings.json').open('rb') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='another command'):
      prepare(Settings(source), str(tmp_path / 'to'))
  assert prepare(Settings(source), str(tmp_path / 'to')).count == 2


@pytest.mark.parametrize(
  'source, message',
  [
    ('images', 'write folder:, webdataset:, parquet:, tfds:'),
    ('foldr:x', "did you mean 'folder:'"),
    ('folder:', '--source=folder:: write folder:'),
    ('folder:/nowhere', 'does not exist'),
    ('folder:gs://bucket/x', 'object store.*gcsfuse'),
    ('webdataset:/nowhere/*.tar', 'no files'),
    ('parquet:gs://bucket/*', 'object store'),
  ],
)
def test_invalid_sources_are_named_in_one_line(tmp_path, source, message):
  with pytest.raises(UserError, match=message) as error:
    prepare(Settings(source), str(tmp_path / 'to'))
  assert '\n' not in str(error.value)


def test_pool_processes_end_when_the_parent_is_killed():
  """Otherwise each retry would leave processes behind."""
  parent = """
import multiprocessing, os, sys, time
from vpe_jax.data.formats.entries import MAX_CAPTION
from vpe_jax.data.preparing import _exit_with_parent
def stay(parent):
  _exit_with_parent(parent)
  print('ready', flush=True)
  time.sleep(600)
if __name__ == '__main__':
  multiprocessing.get_context('fork').Process(target=stay, args=(os.getpid(),)).start()
  time.sleep(600)
"""
  with subprocess.Popen(
    [sys.executable, '-c', parent], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    process.kill()
    # Both processes hold the pipe, so it closes when both have ended.
    assert process.stdout.read() == ''
