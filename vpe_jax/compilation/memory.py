"""Memory of a compiled program on one chip: totals, and the largest buffers.

Totals are XLA's own memory analysis or, where the program doesn't fit, what the compiler's error
says. The buffers come from the report in the compiler's dump folder.
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
  said = Usage(
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
    found.temp_size_in_bytes,
    found.generated_code_size_in_bytes,
    found.peak_memory_in_bytes,
    _listed(folder),
  )
  # XLA:CPU's peak can leave out temporaries: it is no less than what must exist at one time.
  least = max(said.arguments, said.temporary)
  return said if said.peak >= least else dataclasses.replace(said, peak=said.planned)


def buffers_of(report: str) -> tuple[Buffer, ...]:
  """The largest HBM buffers of a report, whose rows are `total; size; offset; uses; shapes`."""
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


def overflow(message: str, arguments: float, folder: pathlib.Path) -> Usage | None:
  """The memory of a program that doesn't fit; None if the message is about another thing.

  Args:
    message: of the compiler; it names the bytes of temporaries, and of the memory.
    arguments: bytes of the program's arguments on one chip, which the message leaves out.
    folder: of the dump.
  """
  found = re.search(r'\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)', message)
  if found is None:
    return None
  temporary, limit = map(_bytes, found.groups())
  peak = arguments + temporary
  buffers = _listed(folder)
  return Usage(arguments, 0, 0, temporary, 0, peak, buffers, limit, fits=False)


def _listed(folder: pathlib.Path) -> tuple[Buffer, ...]:
  reports = sorted(folder.glob(f'*{_REPORT}'), key=lambda path: path.stat().st_size)
  return buffers_of(reports[-1].read_text(encoding='utf-8')) if reports else ()


def _bytes(text: str) -> float:
  """`13.00GiB`, `15.75G` or `160B` as bytes."""
  number, unit = re.fullmatch(r'([\d.]+)([KMGT]?)i?B?', text.strip()).groups()
  return float(number) * _UNITS[unit]
