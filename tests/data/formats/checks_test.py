"""The check of image files is shared by processes, which agree on its result."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vpe_jax.data.formats.folder import ReadOptions, open_folder

SCRIPT = Path(__file__).with_name('one_of_two.py')
ROOT = Path(__file__).parents[3]
NAMES = [f'{number:02d}.png' for number in range(10)]
BAD = ['03.png', '06.png']  # one in the part of each process


@pytest.fixture
def folder(tmp_path):
  """Ten images and their captions, of which two images are damaged."""
  (tmp_path / 'images').mkdir()
  for number, name in enumerate(NAMES):
    path = tmp_path / 'images' / name
    Image.new('RGB', (8, 8), (number, 0, 0)).save(path)
    path.with_suffix('.txt').write_text(f'image {number}')
  for name in BAD:
    (tmp_path / 'images' / name).write_bytes(b'none')
  return tmp_path / 'images'


def _open_in_two_processes(folders, most_skipped):
  """Checked files and result of two processes: a folder's entries and digests, or an error."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{listener.getsockname()[1]}'
  variables = {
    'JAX_COORDINATOR_ADDRESS': address,
    'JAX_NUM_PROCESSES': '2',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'VPE_JAX_CACHE': str(folders[0].parent / 'cache'),
  }
  processes = [
    subprocess.Popen(
      [sys.executable, str(SCRIPT), str(folder), str(most_skipped)],
      env=os.environ | variables | {'JAX_PROCESS_ID': str(index)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for index, folder in enumerate(folders)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
def test_processes_share_a_check_and_agree(folder, monkeypatch):
  (first, error), (second, other) = _open_in_two_processes([folder] * 2, 0.0)
  assert (first, second) == (NAMES[::2], NAMES[1::2])
  assert error == other and all(name in error for name in ('2 of 10', *BAD))
  # Each process stored its results, so that only damaged files are checked again.
  (first, one), (second, other) = _open_in_two_processes([folder] * 2, 0.2)
  assert (first, second) == (BAD[1:], BAD[:1])
  monkeypatch.setenv('VPE_JAX_CACHE', str(folder.parent / 'another'))
  whole = open_folder(str(folder), ReadOptions(most_skipped=0.2))
  assert one == other == [[names[0] for names in whole.entries], whole.digests()]


@pytest.mark.slow
def test_processes_that_see_different_files_are_refused(folder, tmp_path):
  copy = tmp_path / 'copy'
  folder.rename(copy)
  folder.mkdir()
  for path in sorted(copy.iterdir())[:-2]:
    (folder / path.name).write_bytes(path.read_bytes())
  (_, error), (_, other) = _open_in_two_processes([folder, copy], 0.9)
  for message in (error, other):
    assert 'the hosts list different images' in message
