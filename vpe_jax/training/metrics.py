"""RUN/metrics.jsonl: one JSON object per step, each step exactly once.

Local runs append to one file and flush each line. Object stores have no append, so remote runs
write numbered parts. A run that resumes at step N first drops all records after N. A new run
renames existing files instead of replacing them.
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
PART_RECORDS = 200  # maximum number of records that a remote run buffers

Record = dict[str, Any]


def read(workdir: epath.PathLike, numbered: bool | None = None) -> list[Record]:
  """Reads all complete records of a run in order of step; skips a line truncated by a crash.

  Args:
    workdir: the run's folder.
    numbered: whether it has numbered parts (None: if the folder is remote).
  """
  folder, records = epath.Path(workdir).expanduser(), []
  for path in _files(folder, is_remote(folder) if numbered is None else numbered):
    records += parse(_text(path))
  return records


class MetricsFile:
  """Writes the records of a run; only process 0 may create one."""

  def __init__(self, workdir: epath.PathLike, resumed: int, numbered: bool | None = None):
    """Opens the file and drops the records after step `resumed`.

    Args:
      workdir: the run's folder.
      resumed: step of the restored state (0: a new run, which renames existing files).
      numbered: whether to write numbered parts (None: if the folder is remote).
    """
    self._folder = epath.Path(workdir)
    self._numbered = is_remote(workdir) if numbered is None else numbered
    self._folder.mkdir(parents=True, exist_ok=True)
    self._buffer: list[Record] = []
    for path in _files(self._folder, self._numbered):
      if resumed:
        _truncate(path, resumed)
      else:
        _move_aside(path)
    self._stream = None if self._numbered else open(self._folder / FILE, 'a', encoding='utf-8')

  def write(self, record: Record) -> None:
    """Writes the record of one step; values that are not finite become null."""
    if self._stream is None:
      self._buffer.append(record)
      if len(self._buffer) >= PART_RECORDS:
        self.flush()
    else:
      self._stream.write(_line(record))
      self._stream.flush()

  def flush(self) -> None:
    """Makes all records durable; called before a checkpoint of the same step."""
    if self._stream is not None:
      os.fsync(self._stream.fileno())
    elif self._buffer:
      text = ''.join(_line(record) for record in self._buffer)
      _part(self._folder, self._buffer[0]['step']).write_text(text)
      self._buffer = []

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    if self._stream is not None:
      self._stream.close()


def _part(folder: epath.Path, step: int) -> epath.Path:
  return folder / f'metrics-{step:09d}.jsonl'


def _files(folder: epath.Path, numbered: bool) -> list[epath.Path]:
  """The metrics files of a run, excluding files with similar names."""
  if not numbered:
    return [folder / FILE] if (folder / FILE).exists() else []
  paths = sorted(folder.glob('metrics-*.jsonl'))
  return [path for path in paths if re.fullmatch(r'metrics-\d{9}\.jsonl', path.name)]


def _move_aside(path: epath.Path) -> None:
  """Renames a file of an earlier run; deletes it if it is empty."""
  if not path.read_bytes():
    path.unlink()
    return
  new_name = storage.move_aside(path, f'{path.name}.before')
  print(f'warning: this run is new, so the records in {path} were renamed to {new_name}')


def _truncate(path: epath.Path, resumed: int) -> None:
  """Removes records after step `resumed` and damaged lines; keeps a copy of a damaged file."""
  text = _text(path)
  if damaged := _damaged(text):
    copy = storage.first_free_path(path, f'{path.name}.damaged')
    path.copy(copy)
    print(
      f'warning: {path} is damaged in line {", ".join(map(str, damaged))}: the run continues '
      f'without these records, and a copy of the file is in {copy.name}'
    )
  truncated = ''.join(_line(record) for record in parse(text) if record['step'] <= resumed)
  if truncated != text:
    _replace(path, truncated)


def _replace(path: epath.Path, text: str) -> None:
  if not text:
    path.unlink()
    return
  storage.write_atomic(path, text.encode())


def parse(text: str) -> list[Record]:
  """Parses the complete lines of a metrics file; skips damaged lines."""
  return [record for record in map(_record, _lines(text)) if record is not None]


def _text(path: epath.Path) -> str:
  # A flipped bit may produce invalid UTF-8, which should damage only its own line.
  return path.read_bytes().decode('utf-8', 'replace')


def _lines(text: str) -> list[str]:
  """The terminated lines of a file; a crash may have truncated the last line."""
  return text.split('\n')[:-1]


def _record(line: str) -> Record | None:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return record if isinstance(record, dict) and isinstance(record.get('step'), int) else None


def _damaged(text: str) -> list[int]:
  """Numbers of the non-empty lines that are not records."""
  numbered = enumerate(_lines(text), 1)
  return [number for number, line in numbered if line and _record(line) is None]


def _line(record: Record) -> str:
  values = {key: _json_value(value) for key, value in record.items()}
  return json.dumps(values, allow_nan=False) + '\n'


def _json_value(value: Any) -> Any:
  if not isinstance(value, float):
    return value
  # Nine digits represent a float32 exactly.
  return float(f'{value:.9g}') if math.isfinite(value) else None
