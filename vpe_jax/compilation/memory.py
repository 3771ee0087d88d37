"""Memory of a compiled program on one chip: totals, and the largest buffers.

Totals are XLA's own memory analysis. The buffers come from the report in the compiler's dump folder
or, where the program doesn't fit, from the compiler's error.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

_UNITS = {'': 1, 'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_REPORT = 'memory-usage-report.txt'
_HBM = 'Memory Space: default'
LISTED = 6  # buffers


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A place in memory: its bytes, and what it holds."""

  bytes: float
  holds: str


@dataclasses.dataclass(frozen=True)
class Usage:
  """Bytes on one chip.

  Attributes:
    arguments: state, frozen networks and batch.
    outputs: results; what reuses an argument's memory is in `aliased` too.
    aliased: outputs that reuse arguments.
    temporary: what the program itself needs.
    code: the program.
    peak: the most that is alive at once, by XLA's analysis.
    buffers: the largest, where the compiler lists them.
    limit: the memory that the compiler plans with, where it says so.
    fits: whether the compiler found room for everything.
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
    """What the program occupies while it runs: its blocks of memory, gaps in them included."""
    return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def usage(compiled: Any, folder: pathlib.Path) -> Usage:
  """The memory of a compiled program whose dump is in `folder` (which may be empty)."""
  found = compiled.memory_analysis()
  reports = sorted(folder.glob(f'*{_REPORT}'), key=lambda path: path.stat().st_size)
  text = reports[-1].read_text(encoding='utf-8') if reports else ''
  return Usage(
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
    found.temp_size_in_bytes,
    found.generated_code_size_in_bytes,
    found.peak_memory_in_bytes,
    buffers_of(text),
  )


def buffers_of(report: str) -> tuple[Buffer, ...]:
  """The largest HBM buffers in a memory usage report: rows of `total; size; offset; uses; shapes`."""
  found = []
  inside = False
  for line in report.splitlines():
    if line.startswith('Memory Space'):
      inside = line.startswith(_HBM)
    cells = line.split(';')
    if inside and len(cells) >= 5 and '(' in cells[0]:
      # What one buffer holds in turn can be a long list: its beginning names it.
      found.append(Buffer(_bytes(cells[1]), cells[4].strip()[:120]))
  return tuple(sorted(found, key=lambda one: -one.bytes)[:LISTED])


def overflow(message: str) -> Usage | None:
  """What the compiler says where a program doesn't fit; None if the message is about another thing.

  Of the totals it names the sum only: it stands as `temporary` and `peak`.
  """
  found = re.search(r'Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm', message)
  if found is None:
    return None
  used, limit = map(_bytes, found.groups())
  rows = re.findall(r'Size: ([\d.]+[KMGT]?)\n((?:.*\n)*?)(?=\s*={5,}|\s*$)', message)
  buffers = []
  for size, body in rows:
    name = re.search(r'op_name="([^"]*)"', body)
    shape = re.search(r'Shape: (\S+)', body)
    told = [part.group(1) for part in (shape, name) if part]
    buffers.append(Buffer(_bytes(size), ' '.join(told)))
  buffers.sort(key=lambda one: -one.bytes)
  return Usage(0, 0, 0, used, 0, used, tuple(buffers[:LISTED]), limit, fits=False)


def _bytes(text: str) -> float:
  """`13.00GiB`, `15.75G` or `160B` as bytes."""
  number, unit = re.fullmatch(r'([\d.]+)([KMGT]?)i?B?', text.strip()).groups()
  return float(number) * _UNITS[unit]
