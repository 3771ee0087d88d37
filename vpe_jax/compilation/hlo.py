"""Parses a compiled XLA program: computations, instructions, and how often each runs.

The text is the optimized HLO from `compiled.as_text()` or a dump folder. XLA's cost analysis counts
the body of a loop once and skips some operations, so the program is analyzed here instead. The trip
count of a loop is the constant in its condition (TPU) or the compiler's `known_trip_count` (CPU).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
  'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4,
  's64': 8, 'u64': 8, 'f16': 2, 'bf16': 2, 'f32': 4, 'f64': 8, 'c64': 8, 'c128': 16, 'token': 0,
}  # fmt: skip
_SHAPE = re.compile(r'\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,<=]*)\](?:\{([^}]*)\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_CALLS = re.compile(
  r'\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation)='
  r'\{?(%[\w.\-]+(?:, %[\w.\-]+)*)'
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array of an instruction's result.

  Attributes:
    dtype: XLA's name, such as `bf16`.
    dims: sizes of its dimensions.
    on_chip: whether it is in on-chip memory (`S(1)` on TPU) rather than in HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool = False

  @property
  def elements(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Bytes without padding; an unknown dtype counts as one byte (8-bit floats)."""
    return self.elements * BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction: `%name = shapes opcode(operands), attributes`."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  argument: str  # text in the parentheses, such as the value of a constant
  is_root: bool

  @property
  def bytes(self) -> float:
    """Bytes of all results."""
    return sum(shape.bytes for shape in self.shapes)

  @property
  def op_name(self) -> str:
    """Its origin in the Python program, such as `jit(step)/jvp()/while/body/dot`."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match.group(1) if match else ''

  def called(self) -> tuple[str, ...]:
    """Names of the computations that it calls, except loop conditions."""
    groups = _CALLS.findall(self.attributes)
    return tuple(name for group in groups for name in _NAME.findall(group))


@dataclasses.dataclass(frozen=True)
class Program:
  """An HLO module.

  Attributes:
    computations: computation -> instruction -> Instruction.
    entry: name of the entry computation.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def runs(self) -> Iterator[tuple[str, float, bool]]:
    """Yields computations: (name, executions per call of the program, whether in a fusion).

    A computation is yielded once for each instruction that calls it. All branches of a conditional
    are counted, which is an upper bound.
    """
    yield from self._from(self.entry, 1.0, False)

  def _from(self, name: str, times: float, fused: bool) -> Iterator[tuple[str, float, bool]]:
    yield name, times, fused
    for instruction in self.computations[name].values():
      inside = fused or instruction.opcode == 'fusion'
      if instruction.opcode in ('while', 'fusion', 'call', 'conditional', 'async-start'):
        count = self.trips(name, instruction) if instruction.opcode == 'while' else 1
        for callee in instruction.called():
          yield from self._from(callee, times * count, inside)

  def trips(self, computation: str, loop: Instruction) -> int:
    """Trip count of a loop; 1 if it is unknown (see `unknown_loops`)."""
    return self._trips(computation, loop) or 1

  def unknown_loops(self) -> list[str]:
    """Names of loops whose trip count depends on data; their bodies are counted once."""
    return [
      loop.name
      for name, computation in self.computations.items()
      for loop in computation.values()
      if loop.opcode == 'while' and self._trips(name, loop) is None
    ]

  def _trips(self, computation: str, loop: Instruction) -> int | None:
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
      return int(known.group(1))
    condition = self.computations[re.search(r'condition=%?([\w.\-]+)', loop.attributes).group(1)]
    limit, index = self._limit(condition)
    if limit is None or index is None:
      return None
    start = self._start(computation, loop, index)
    step = self._step(loop.called()[0], index)
    trips = -(-(limit - start) // step)
    # XLA removes loops that never run, so this counter counts down, or starts at a variable.
    return trips if trips > 0 else None

  def _limit(self, condition: dict[str, Instruction]) -> tuple[int | None, int | None]:
    """The constant that the counter is compared with, and the counter's index in the loop state."""
    root = next(i for i in condition.values() if i.is_root)
    numbers = [int(i.argument) for i in condition.values() if _is_number(i)]
    inner = [self.computations[name] for name in root.called()]
    compares = [root, *(i for c in inner for i in c.values())]
    if not any(i.opcode == 'compare' for i in compares) or len(numbers) != 1:
      return None, None
    indices = {_index(i) for i in condition.values() if i.opcode == 'get-tuple-element'}
    extra = 'direction=LE' in ''.join(i.attributes for i in compares)
    return numbers[0] + extra, indices.pop() if len(indices) == 1 else None

  def _start(self, computation: str, loop: Instruction, index: int) -> int:
    """Initial value of the counter; 0 if it is not a constant."""
    state = self.computations[computation].get(loop.operands[0])
    if state is None or state.opcode != 'tuple':
      return 0
    counter = self.computations[computation].get(state.operands[index])
    while counter is not None and counter.opcode in ('copy', 'bitcast'):
      counter = self.computations[computation].get(counter.operands[0])
    return int(counter.argument) if counter is not None and _is_number(counter) else 0

  def _step(self, body: str, index: int) -> int:
    """Increment of the counter: 2 if the compiler unrolled the loop by two."""
    computation = self.computations[body]
    root = next(i for i in computation.values() if i.is_root)
    counter = computation.get(root.operands[index]) if root.opcode == 'tuple' else None
    while counter is not None and counter.opcode in ('copy', 'bitcast'):
      counter = computation.get(counter.operands[0])
    if counter is None:
      return 1
    scopes = [computation, *(self.computations[name] for name in counter.called())]
    operands = [scope[name] for scope in scopes for name in counter.operands if name in scope]
    numbers = [int(i.argument) for i in operands if _is_number(i)]
    inner = [i for scope in scopes[1:] for i in scope.values()]
    numbers += [int(i.argument) for i in inner if _is_number(i)]
    return numbers[0] if len(numbers) == 1 and numbers[0] > 0 else 1


def parse(text: str) -> Program:
  """Parses HLO text.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if current is None:
      head = _HEAD.match(line)
      if head and ' -> ' in line:
        current = computations.setdefault(head.group(2), {})
        entry = head.group(2) if head.group(1) else entry
    elif line.startswith('}'):
      current = None
    elif match := _LINE.match(line):
      instruction = _instruction(match.group(2), match.group(3), bool(match.group(1)))
      if instruction is not None:
        current[instruction.name] = instruction
  if not entry:
    raise ValueError('the text is not an HLO module: it has no ENTRY')
  return Program(computations, entry)


def shapes_of(text: str) -> tuple[Shape, ...]:
  """Parses the arrays of a type such as `(f32[2,3]{1,0}, s32[])`."""
  return tuple(
    Shape(
      dtype,
      tuple(int(d.lstrip('<=')) for d in dims.split(',') if d),
      'S(' in layout and 'S(0)' not in layout,
    )
    for dtype, dims, layout in _SHAPE.findall(text)
  )


def _instruction(name: str, text: str, is_root: bool) -> Instruction | None:
  cut = _closing(text, 0) + 1 if text.startswith('(') else text.find(' ')
  kind, rest = text[:cut], text[cut:].lstrip()
  opcode, paren, _ = rest.partition('(')
  if not paren:
    return None
  start = len(opcode)
  end = _closing(rest, start)
  argument = rest[start + 1 : end]
  operands = tuple(_NAME.findall(argument))
  return Instruction(name, opcode, shapes_of(kind), operands, rest[end + 1 :], argument, is_root)


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.finditer(r'[()]', text[start:]):
    depth += 1 if match.group() == '(' else -1
    if not depth:
      return start + match.start()
  return len(text)


def _is_number(instruction: Instruction) -> bool:
  return instruction.opcode == 'constant' and instruction.argument.lstrip('-').isdigit()


def _index(instruction: Instruction) -> int:
  return int(re.search(r'index=(\d+)', instruction.attributes).group(1))
