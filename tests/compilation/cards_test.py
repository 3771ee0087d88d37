"""Tests of the table of compilation reports in a config's card."""

from __future__ import annotations

import errno
import json
import pathlib

import pytest
from etils import epath

from vpe_jax.compilation import cards
from vpe_jax.contracts import UserError

REPORT = {
  'config': 't2i:paper', 'stage': 'joint', 'program': 'train', 'topology': 'v5p:4x4x4',
  'images_per_step': 1920, 'peak_bytes_per_device': 8.44e9, 'hbm_fraction': 0.081, 'fits': True,
  'step_time_bound_s': 0.6128, 'bound_by': 'hbm', 'mfu_bound': 0.4321,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  """A folder with a config that has an old table, and with reports of two configs."""
  text = f'# Cards\n\n{cards.begin("t2i")}old\n{cards.END}\n\nKEPT\n'
  (tmp_path / 'README.md').write_text(text)
  (tmp_path / 't2i.py').write_text('"""A config."""\n')
  (tmp_path / 'a.json').write_text(json.dumps(REPORT))
  (tmp_path / 'b.json').write_text(json.dumps(REPORT | {'program': 'sample', 'fits': False}))
  (tmp_path / 'c.json').write_text(json.dumps(REPORT | {'config': 'codec:tiny'}))
  return tmp_path


def test_only_the_table_is_replaced(folder):
  path = str(folder / 't2i.py')
  assert cards.write(path, str(folder)) == 2
  text = (folder / 'README.md').read_text()
  _, _, first, second = text.split(cards.begin('t2i'))[1].split(cards.END)[0].splitlines()
  assert first == '| paper | joint | v5p:4x4x4 | 1,920 | 8.4 GB | 8% | 0.61 s (hbm) | 43% |'
  assert '| sample |' in second and '(does not fit)' in second
  assert 'old' not in text and text.endswith('\n\nKEPT\n')
  assert cards.write(path, str(folder)) == 2 and (folder / 'README.md').read_text() == text


def test_missing_files_or_markers_are_errors(folder):
  with pytest.raises(UserError, match='no such file'):
    cards.write(str(folder / 'x.py'), str(folder))
  with pytest.raises(UserError, match='no reports of'):
    cards.write(str(folder / 't2i.py'), str(folder / 'nowhere'))
  (folder / 'README.md').write_text('# Cards\n')
  with pytest.raises(UserError, match='the card needs the lines'):
    cards.write(str(folder / 't2i.py'), str(folder))


def test_unknown_values_are_dashes(folder):
  unknown = dict.fromkeys(('hbm_fraction', 'step_time_bound_s', 'bound_by', 'mfu_bound'))
  row = cards.table([REPORT | unknown]).splitlines()[-1]
  assert row.endswith('| 8.4 GB | - | - | - |')


@pytest.mark.parametrize(
  'content',
  [b'', b'{"config": "t2i:pa', b'[1]', b'{}', b'\xff\x00', None]
  + [
    json.dumps(REPORT | {'topology': text}).encode()
    for text in ('a | b', '<!-- end -->', 'a\nb', None)
  ],
)
def test_error_names_a_damaged_report_and_keeps_the_cards(folder, content):
  path, broken = folder / 't2i.py', folder / 'd.json'
  text = (folder / 'README.md').read_text()
  broken.mkdir() if content is None else broken.write_bytes(content)
  with pytest.raises(UserError, match='d.json is not a report of vpe_jax.compile') as error:
    cards.write(str(path), str(folder))
  assert '\n' not in str(error.value) and (folder / 'README.md').read_text() == text


def test_a_card_without_its_own_end_keeps_the_next_card():
  text = f'{cards.begin("t2i")}table\nprose\n{cards.begin("edit")}table\n{cards.END}\n'
  with pytest.raises(UserError, match='compiled: t2i.* and '):
    cards.rewrite(text, 't2i', [REPORT])
  assert 'prose' in cards.rewrite(text, 'edit', [REPORT])


def test_full_disk_keeps_the_cards(folder, monkeypatch):
  cards_file = folder / 'README.md'
  text = cards_file.read_text()

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(epath.Path, 'write_bytes', full)
  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(UserError, match='free some space'):
    cards.write(str(folder / 't2i.py'), str(folder))
  assert cards_file.read_text() == text


def test_shipped_cards_have_the_markers():
  text = pathlib.Path('configs/README.md').read_text(encoding='utf-8')
  assert cards.table([REPORT]) in cards.rewrite(text, 't2i', [REPORT])


def test_the_folder_of_reports_may_begin_with_the_home_folder(folder, monkeypatch):
  monkeypatch.setenv('HOME', str(folder))
  assert cards.write(str(folder / 't2i.py'), '~') == 2
