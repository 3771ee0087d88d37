"""Memory of a compiled program on one device: totals and the largest buffers.

The totals are from XLA's memory analysis or, if the program doesn't fit, from the compiler's error.
The buffers are from the report in the compiler's dump folder.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

_UNITS = {'': 1, 'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_REPORT = 'memory-usage-report.txt'
_HBM = 'Memory Space: default'
MAX_BUFFERS = 6


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A buffer: its bytes, and a description of the arrays that it holds."""

  bytes: float
  holds: str


@dataclasses.dataclass(frozen=True)
class Usage:
  """Bytes on one device.

  Attributes:
    arguments: inputs of the program, such as state, frozen networks and batch.
    outputs: results, including those in `aliased`.
    aliased: outputs that reuse the memory of arguments.
    temporary: temporary buffers.
    code: the executable.
    peak: maximum number of bytes in use at one time, by XLA's analysis; an estimate from the other
      fields where XLA gives none.
    buffers: the largest buffers, if the compiler lists them.
    limit: the compiler's memory limit, if known.
    fits: whether the compiler could allocate all buffers.
  """

  arguments: float
  outputs: float
  aliased: float
  temporary: float
  code: float
  peak: float
  buffers: tuple[Buffer, ...] = ()
  limit: float | None = None
  fits: bool = True

  @property
  def planned(self) -> float:
    """Bytes allocated while the program runs, including fragmentation."""
    return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def usage(compiled: Any, folder: pathlib.Path) -> Usage:
  """The memory of a compiled program; `folder` is its dump, which may be empty."""
  stats = compiled.memory_analysis()
  result = Usage(
    stats.argument_size_in_bytes,
    stats.output_size_in_bytes,
    stats.alias_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.generated_code_size_in_bytes,
    stats.peak_memory_in_bytes,
    _buffers_in(folder),
  )
  # XLA:CPU's peak may omit temporaries. Below this minimum it is replaced by the total.
  minimum = max(result.arguments, result.temporary)
  return result if result.peak >= minimum else dataclasses.replace(result, peak=result.planned)


def buffers_of(report: str) -> tuple[Buffer, ...]:
  """Parses the largest HBM buffers of a report with lines `total; size; offset; uses; shapes`."""
  buffers = []
  in_hbm = False
  for line in report.splitlines():
    if line.startswith('Memory Space'):
      in_hbm = line.startswith(_HBM)
    cells = line.split(';')
    if in_hbm and len(cells) >= 5 and '(' in cells[0]:
      # The list of arrays that share a buffer can be long: it is truncated.
      buffers.append(Buffer(_bytes(cells[1]), cells[4].strip()[:120]))
  return tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)[:MAX_BUFFERS])


def overflow(message: str, arguments: float, folder: pathlib.Path) -> Usage | None:
  """The memory of a program that doesn't fit; None if the message is another error.

  Args:
    message: the compiler's error, which has the bytes of temporaries and the limit.
    arguments: bytes of the program's arguments on one device, which the message omits.
    folder: the compiler's dump folder.
  """
  match = re.search(r'\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)', message)
  if match is None:
    return None
  temporary, limit = map(_bytes, match.groups())
  peak = arguments + temporary
  buffers = _buffers_in(folder)
  return Usage(arguments, 0, 0, temporary, 0, peak, buffers, limit, fits=False)


def _buffers_in(folder: pathlib.Path) -> tuple[Buffer, ...]:
  reports = sorted(folder.glob(f'*{_REPORT}'), key=lambda path: path.stat().st_size)
  return buffers_of(reports[-1].read_text(encoding='utf-8')) if reports else ()


def _bytes(text: str) -> float:
  """Parses `13.00GiB`, `15.75G` or `160B` to bytes."""
  number, unit = re.fullmatch(r'([\d.]+)([KMGT]?)i?B?', text.strip()).groups()
  return float(number) * _UNITS[unit]
