"""RUN/metrics.jsonl: one JSON object for every step, each step exactly once.

Local runs append to one file and flush each line. An object store has no append, so remote runs
write numbered parts. A run that resumes at step N drops every record beyond N before it goes on;
a new run puts what it finds aside, for that may be somebody else's.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

from etils import epath

from vpe_jax import storage
from vpe_jax.storage import is_remote

FILE = 'metrics.jsonl'
PART_RECORDS = 200  # records that a remote run holds back at most

Record = dict[str, Any]


def read(workdir: epath.PathLike, numbered: bool | None = None) -> list[Record]:
  """All complete records of a run in order of step; a line cut off by a crash is left out.

  Args:
    workdir: the run's folder.
    numbered: whether it holds numbered parts (None: if the folder is remote).
  """
  folder, records = epath.Path(workdir).expanduser(), []
  for path in _files(folder, is_remote(folder) if numbered is None else numbered):
    records += parse(_text(path))
  return records


class MetricsFile:
  """Writes the records of one run; only process 0 may own one."""

  def __init__(self, workdir: epath.PathLike, resumed: int, numbered: bool | None = None):
    """Opens the file without the records beyond step `resumed`.

    Args:
      workdir: the run's folder.
      resumed: step of the restored state (0: a new run, which renames files that are there).
      numbered: whether to write numbered parts (None: if the folder is remote).
    """
    self._folder = epath.Path(workdir)
    self._numbered = is_remote(workdir) if numbered is None else numbered
    self._folder.mkdir(parents=True, exist_ok=True)
    self._held: list[Record] = []
    for path in _files(self._folder, self._numbered):
      if resumed:
        _truncate(path, resumed)
      else:
        _move_aside(path)
    self._stream = None if self._numbered else open(self._folder / FILE, 'a', encoding='utf-8')

  def write(self, record: Record) -> None:
    """Adds the record of one step; numbers that are not finite become null."""
    if self._stream is None:
      self._held.append(record)
      if len(self._held) >= PART_RECORDS:
        self.flush()
    else:
      self._stream.write(_line(record))
      self._stream.flush()

  def flush(self) -> None:
    """Makes everything written so far durable: called before a checkpoint of the same step."""
    if self._stream is not None:
      os.fsync(self._stream.fileno())
    elif self._held:
      text = ''.join(_line(record) for record in self._held)
      _part(self._folder, self._held[0]['step']).write_text(text)
      self._held = []

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    if self._stream is not None:
      self._stream.close()


def _part(folder: epath.Path, step: int) -> epath.Path:
  return folder / f'metrics-{step:09d}.jsonl'


def _files(folder: epath.Path, numbered: bool) -> list[epath.Path]:
  """The files that a run of this kind writes; copies beside them are none of ours."""
  if not numbered:
    return [folder / FILE] if (folder / FILE).exists() else []
  found = sorted(folder.glob('metrics-*.jsonl'))
  return [path for path in found if re.fullmatch(r'metrics-\d{9}\.jsonl', path.name)]


def _move_aside(path: epath.Path) -> None:
  """Renames a file that a new run finds in its place, unless it is empty."""
  if not path.read_bytes():
    path.unlink()
    return
  now = storage.move_aside(path, f'{path.name}.before')
  print(f'warning: this run is new, so the records in {path} were renamed to {now}')


def _truncate(path: epath.Path, resumed: int) -> None:
  text = _text(path)
  if wrong := _damaged(text):
    copy = storage.first_free_path(path, f'{path.name}.damaged')
    path.copy(copy)
    print(
      f'warning: {path} is damaged in line {", ".join(map(str, wrong))}: the run goes on without '
      f'these records, and a copy of the file is in {copy.name}'
    )
  kept = ''.join(_line(record) for record in parse(text) if record['step'] <= resumed)
  if kept != text:
    _replace(path, kept)


def _replace(path: epath.Path, text: str) -> None:
  if not text:
    path.unlink()
    return
  storage.write_atomic(path, text.encode())


def parse(text: str) -> list[Record]:
  """The complete lines of a metrics file as records; damaged ones are left out."""
  return [record for record in map(_record, _lines(text)) if record is not None]


def _text(path: epath.Path) -> str:
  # A flipped bit may leave what is no UTF-8: its line is damaged, the others are not.
  return path.read_bytes().decode('utf-8', 'replace')


def _lines(text: str) -> list[str]:
  """The lines of a file that end; the last one may have been cut short by a crash."""
  return text.split('\n')[:-1]


def _record(line: str) -> Record | None:
  try:
    found = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) and isinstance(found.get('step'), int) else None


def _damaged(text: str) -> list[int]:
  """Numbers of the lines that hold something, but no record."""
  numbered = enumerate(_lines(text), 1)
  return [number for number, line in numbered if line and _record(line) is None]


def _line(record: Record) -> str:
  return json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False) + '\n'


def _plain(value: Any) -> Any:
  if not isinstance(value, float):
    return value
  # Nine digits hold a float32 exactly.
  return float(f'{value:.9g}') if math.isfinite(value) else None
