"""Memory of a compiled program on one device: totals, the largest buffers, and running out of it.

The totals are from XLA's memory analysis or, if the program doesn't fit, from the compiler's error.
The buffers are from the compiler's dump folder: from its memory report or, on platforms without
one, from the optimized program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from vpe_jax.config import Config
from vpe_jax.contracts import UserError

_UNITS = {'': 1, 'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_REPORT = 'memory-usage-report.txt'
_HBM = 'Memory Space: default'
_PROGRAM = 'after_optimizations.txt'
# An instruction of an optimized program: `%name = f32[8,16]{1,0} opcode(..., op_name="..."`.
_ARRAY = re.compile(r' %?[\w.-]+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\((?:.*op_name="([^"]*)")?')
_UNALLOCATED = ('bitcast', 'constant', 'get-tuple-element', 'parameter')  # opcodes without a buffer
_OVERFLOW = re.compile(r'\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)')
_EXHAUSTED = 'RESOURCE_EXHAUSTED'
DUMP = {'xla_dump_hlo_as_text': True}  # compiler options of a dump, besides its folder
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


def usage(compiled: Any, folder: pathlib.Path | None = None) -> Usage | None:
  """The memory of a compiled program; None if the backend does not report it.

  Args:
    compiled: the program.
    folder: the compiler's dump folder, which may be empty; None without one.
  """
  stats = compiled.memory_analysis()
  if stats is None:
    return None
  result = Usage(
    stats.argument_size_in_bytes,
    stats.output_size_in_bytes,
    stats.alias_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.generated_code_size_in_bytes,
    stats.peak_memory_in_bytes,
    () if folder is None else buffers_in(folder),
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
  match = _OVERFLOW.search(message)
  if match is None:
    return None
  temporary, limit = map(_bytes, match.groups())
  peak = arguments + temporary
  buffers = buffers_in(folder)
  return Usage(arguments, 0, 0, temporary, 0, peak, buffers, limit, fits=False)


def buffers_in(folder: pathlib.Path) -> tuple[Buffer, ...]:
  """The largest buffers of the program in a dump folder; none if the folder is empty."""
  for suffix, parse in ((_REPORT, buffers_of), (_PROGRAM, arrays_of)):
    files = sorted(folder.glob(f'*{suffix}'), key=lambda path: path.stat().st_size)
    if files:
      return parse(files[-1].read_text(encoding='utf-8'))
  return ()


def arrays_of(text: str) -> tuple[Buffer, ...]:
  """The largest arrays that an optimized program allocates; those inside of fusions have no buffer.

  Args:
    text: the program as HLO text, whose shapes are those of one device.
  """
  buffers: dict[str, Buffer] = {}
  in_fusion = False
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      in_fusion = 'fused_computation' in line
    match = None if in_fusion else _ARRAY.search(line)
    if match is None or match[3] in _UNALLOCATED or not (bits := re.search(r'\d+', match[1])):
      continue
    count = math.prod(int(size) for size in match[2].split(',') if size)
    holds = f'{match[1]}[{match[2]}]' + (f' of {match[4][-80:]}' if match[4] else '')
    buffers[holds] = Buffer(count * int(bits[0]) / 8, holds)
  return tuple(sorted(buffers.values(), key=lambda buffer: -buffer.bytes)[:MAX_BUFFERS])


def is_exhausted(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether an error of XLA means that a device is out of memory."""
  return _EXHAUSTED in str(error)


@contextlib.contextmanager
def explained(
  name: str, config: Config, stage: int, lowered: jax.stages.Lowered | None = None
) -> Iterator[None]:
  """Context in which running out of device memory becomes a one-line error.

  Args:
    name: the program that is compiled or runs, or the arrays that are made.
    config: configuration of the run.
    stage: index of the stage.
    lowered: the program; on an error it is compiled again, to list its largest buffers.

  Raises:
    UserError: the block ran out of memory.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not is_exhausted(error):
      raise
    buffers = () if lowered is None else largest_buffers(lowered)
    raise UserError(exhausted_text(name, amounts(str(error)), buffers, config, stage)) from error


def exhausted_text(
  name: str, need: str, buffers: tuple[Buffer, ...], config: Config, stage: int
) -> str:
  """One line: the program, the memory that it needs, its largest buffers, and the cure."""
  listed = ', '.join(f'{size_text(buffer.bytes)} {buffer.holds}' for buffer in buffers)
  return (
    f'out of device memory in {name}: {need}'
    f'{f"; largest buffers: {listed}" if listed else ""}; {_cure(config, stage)}'
  )


def amounts(message: str) -> str:
  """The bytes that an out-of-memory error of XLA names, or its first line."""
  if match := _OVERFLOW.search(message):
    needed, limit = (size_text(_bytes(text)) for text in match.groups())
    return f'temporaries need {needed} and a device has {limit}'
  if match := re.search(r'allocat\w+ (\d+) bytes|allocat\w+ ([\d.]+ ?[KMGT]iB)', message):
    amount = size_text(float(match[1])) if match[1] else match[2]
    return f'no room for {amount} more'
  return message.splitlines()[0].removeprefix(f'{_EXHAUSTED}: ')


def largest_buffers(lowered: jax.stages.Lowered) -> tuple[Buffer, ...]:
  """Compiles a program again, without a cache, for the compiler's list of buffers."""
  with tempfile.TemporaryDirectory() as folder:
    # A program that doesn't fit fails again, after the compiler has written its report.
    # The timestamp makes JAX's compilation cache miss, which would skip the report.
    options = {**DUMP, 'xla_dump_to': folder, 'xla_dump_include_timestamp': True}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      lowered.compile(compiler_options=options)
    return buffers_in(pathlib.Path(folder))


def _cure(config: Config, stage: int) -> str:
  """The settings that reduce memory, with their values."""
  optim = config.optim_of(stage)
  knobs = [f'a smaller batch_size (now {config.batch_size[stage]:,})']
  knobs.append(f'a larger optim.accumulate (now {optim.accumulate})')
  if config.remat != 'full':
    knobs.append(f'remat=full (now {config.remat})')
  if config.dtype != 'bfloat16':
    knobs.append(f'dtype=bfloat16 (now {config.dtype})')
  if optim.ema:
    knobs.append(f'optim.ema=0 (now {optim.ema:g}: a copy of the parameters)')
  knobs.append('more devices along mesh.fsdp or mesh.tensor')
  knobs.append('evals.NAME.every=0 for an evaluator')
  return f'try {", ".join(knobs)}'


def size_text(count: float) -> str:
  """Formats bytes as MiB, or as GiB from one GiB on."""
  return f'{count / 2**30:,.1f} GiB' if count >= 2**30 else f'{count / 2**20:,.1f} MiB'


def _bytes(text: str) -> float:
  """Parses `13.00GiB`, `15.75G` or `160B` to bytes."""
  number, unit = re.fullmatch(r'([\d.]+)([KMGT]?)i?B?', text.strip()).groups()
  return float(number) * _UNITS[unit]
