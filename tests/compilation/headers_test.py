"""Tests of the table of compilation reports in a config's header."""

from __future__ import annotations

import ast
import errno
import json
import pathlib

import pytest
from etils import epath

from vpe_jax.compilation import headers
from vpe_jax.contracts import UserError

REPORT = {
  'config': 't2i:paper', 'stage': 'joint', 'what': 'train', 'topology': 'v5p:4x4x4',
  'images_per_step': 1920, 'peak_bytes_per_chip': 8.44e9, 'hbm_fraction': 0.081, 'fits': True,
  'step_time_bound_s': 0.6128, 'bound_by': 'hbm', 'mfu_bound': 0.4321,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  """A folder with a config that has an old table, and with reports of two configs."""
  text = f'"""A config.\n\n{headers.BEGIN}  old\n{headers.END}"""\n\nKEPT = 1\n'
  (tmp_path / 't2i.py').write_text(text)
  (tmp_path / 'a.json').write_text(json.dumps(REPORT))
  (tmp_path / 'b.json').write_text(json.dumps(REPORT | {'what': 'sample', 'fits': False}))
  (tmp_path / 'c.json').write_text(json.dumps(REPORT | {'config': 'codec:tiny'}))
  return tmp_path


def test_only_the_table_is_replaced(folder):
  path = folder / 't2i.py'
  assert headers.write(str(path), str(folder)) == 2
  text = path.read_text()
  rows = ast.get_docstring(ast.parse(text)).split(headers.BEGIN.strip())[1].splitlines()[1:-1]
  assert rows[1].split() == [
    'paper', 'joint', 'v5p:4x4x4', '1,920', '8.4', 'GB', '8%', '0.61', 's', '(hbm)', '43%',
  ]  # fmt: skip
  assert rows[2].split()[1] == 'sample' and '(does not fit)' in rows[2]
  assert len(rows) == 3 and 'old' not in text and text.endswith('\n\nKEPT = 1\n')
  assert headers.write(str(path), str(folder)) == 2 and path.read_text() == text


def test_missing_files_or_markers_are_errors(folder):
  with pytest.raises(UserError, match='no such file'):
    headers.write(str(folder / 'x.py'), str(folder))
  with pytest.raises(UserError, match='no reports of'):
    headers.write(str(folder / 't2i.py'), str(folder / 'nowhere'))
  (folder / 't2i.py').write_text('"""No table."""\n')
  with pytest.raises(UserError, match='the header needs the lines'):
    headers.write(str(folder / 't2i.py'), str(folder))


def test_unknown_values_are_dashes(folder):
  unknown = dict.fromkeys(('hbm_fraction', 'step_time_bound_s', 'bound_by', 'mfu_bound'))
  (row,) = headers.table([REPORT | unknown]).splitlines()[1:]
  assert row.split()[-5:] == ['8.4', 'GB', '-', '-', '-']


@pytest.mark.parametrize(
  'content',
  [b'', b'{"config": "t2i:pa', b'[1]', b'{}', b'\xff\x00', None]
  + [
    json.dumps(REPORT | {'topology': text}).encode()
    for text in ('x"""\nprint(1)\n"""y', 'a\\', 'a\nb', None)
  ],
)
def test_error_names_a_damaged_report_and_keeps_the_config(folder, content):
  path, broken = folder / 't2i.py', folder / 'd.json'
  text = path.read_text()
  broken.mkdir() if content is None else broken.write_bytes(content)
  with pytest.raises(UserError, match='d.json is not a report of vpe_jax.compile') as error:
    headers.write(str(path), str(folder))
  assert '\n' not in str(error.value) and path.read_text() == text


def test_full_disk_keeps_the_config(folder, monkeypatch):
  path = folder / 't2i.py'
  text = path.read_text()

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(epath.Path, 'write_bytes', full)
  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(UserError, match='free some space'):
    headers.write(str(path), str(folder))
  assert path.read_text() == text


def test_shipped_config_has_the_markers():
  text = pathlib.Path('configs/t2i.py').read_text(encoding='utf-8')
  assert headers.table([REPORT]) in headers.rewrite(text, [REPORT])
