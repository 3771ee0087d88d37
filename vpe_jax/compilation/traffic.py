"""FLOPs, HBM traffic and collectives of one call of a compiled program on one device.

Every instruction counts as often as it runs: loop bodies are multiplied by their trip counts.

FLOPs: dots and convolutions (TPU programs express dots as convolutions); a multiply-add counts two.
Only kernel positions inside the (dilated, unpadded) input of a convolution count, as in XLA's
analysis. Otherwise, batched dots that TPU programs express as dilated convolutions would be counted
several times.

HBM bytes: operands and results in HBM of every instruction and fusion. If a fusion reads slices of
an array, or updates a slice in place, only the slices count.

Collectives: bytes that one device receives. With n devices in a group and S bytes of the whole
array (the result of an all-gather, the operand of any other), these are S (n-1)/n for all-gather,
reduce-scatter and all-to-all, 2 S (n-1)/n for all-reduce (a reduce-scatter and an all-gather), and
S for collective-permute. The compiler may split a collective over several fusions to overlap it
with their work; all parts have the same channel id. Such a collective, and the arrays passed
between its parts, count once, with the smallest execution count of its parts (a loop may continue
it in every iteration).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from vpe_jax.compilation.hlo import Instruction, Program, Shape
from vpe_jax.ops.flops import window_positions

KINDS = (
  'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute',
  'collective-broadcast', 'ragged-all-to-all',
)  # fmt: skip
_FACTOR = {'all-reduce': 2.0}
# Opcodes counted without HBM traffic: aliases, control flow and async-start (their bodies are
# counted), second halves of asynchronous operations, constants, and device ids.
_NO_TRAFFIC = {
  'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call',
  'after-all', 'partition-id', 'replica-id', 'iota', 'opt-barrier', 'copy-done', 'async-start',
  'async-update', 'async-done', 'add-dependency', 'rng-get-and-update-state',
}  # fmt: skip
MAX_LISTED = 8  # operations with the largest HBM traffic
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective.

  Attributes:
    kind: one of KINDS.
    name: name of the instruction.
    op_name: origin of the instruction in the Python program.
    shapes: arrays of its result.
    times: number of executions.
    size: number of devices in a group.
    slices: number of slices that a group spans; for a permutation, that its first pair spans.
    bytes: bytes that one device receives in all executions.
  """

  kind: str
  name: str
  op_name: str
  shapes: tuple[Shape, ...]
  times: float
  size: int
  slices: int
  bytes: float

  @property
  def dcn_bytes(self) -> float:
    """Bytes that one device receives from other slices, with the load balanced over devices.

    Each slice receives from the others (slices - 1) / slices of the array. Its size / slices
    devices in the group receive equal parts of that.
    """
    if self.slices == 1:
      return 0.0
    whole = self.bytes / (self.size - 1) * self.size
    return whole * (self.slices - 1) / self.slices / (self.size / self.slices)


@dataclasses.dataclass(frozen=True)
class Work:
  """One call of a program on one device.

  Attributes:
    flops: FLOPs of dots and convolutions.
    hbm_bytes: bytes read from and written to HBM.
    collectives: the collectives, one for each channel.
    kernels: number of executions of custom kernels (Pallas), whose FLOPs HLO doesn't show.
    unknown_loops: loops without a known trip count, whose bodies count once.
    largest_traffic: (operation, its part of `hbm_bytes`), largest first.
  """

  flops: float
  hbm_bytes: float
  collectives: tuple[Collective, ...]
  kernels: float
  unknown_loops: tuple[str, ...]
  largest_traffic: tuple[tuple[str, float], ...] = ()

  def collective_bytes(self) -> dict[str, float]:
    """Bytes that one device receives, by kind."""
    total: dict[str, float] = {}
    for collective in self.collectives:
      total[collective.kind] = total.get(collective.kind, 0.0) + collective.bytes
    return total


def work_of(program: Program, slice_of: Sequence[int]) -> Work:
  """Counts the work of a program.

  Args:
    program: from `hlo.parse`.
    slice_of: index of each device's slice, in the order of the program's partitions.
  """
  flops = kernels = 0.0
  channels: dict[str, Collective] = {}
  traffic: Counter[str] = Counter()
  overlapped: dict[str, tuple[str, float]] = {}
  for name, times, fused in program.runs():
    scope = program.computations[name]
    for op in scope.values():
      if op.opcode == 'convolution':
        flops += times * _convolution_flops(op, scope)
      elif op.opcode == 'dot':
        flops += times * _dot_flops(op, scope)
      elif op.opcode == 'custom-call' and 'tpu_custom_call' in op.attributes:
        kernels += times
      collective = _collective_of(op, scope, times, slice_of)
      if collective is not None:
        channel = f'{collective.kind} {_field(op, "channel_id") or f"{name}/{op.name}"}'
        previous = channels.get(channel)
        if previous is None or collective.times < previous.times:
          channels[channel] = collective
          if fused:
            # A reduce-scatter fused from an all-reduce writes only the fusion's result, which is
            # counted there.
            result = _in_hbm(op.shapes) if collective.kind == op.opcode else 0.0
            count = times * (sum(_read(op, scope)) + result)
            overlapped[channel] = (op.op_name or op.name, count)
      if not fused:
        traffic[op.op_name or op.name] += times * _hbm_bytes(program, op, scope)
  for operation, count in overlapped.values():
    traffic[operation] += count
  unknown = tuple(program.unknown_loops())
  largest = tuple(traffic.most_common(MAX_LISTED))
  return Work(flops, sum(traffic.values()), tuple(channels.values()), kernels, unknown, largest)


def group_of(attributes: str, count: int) -> tuple[int, ...]:
  """Parses the first group of devices of a collective.

  Args:
    attributes: attributes of the instruction. Groups are written as lists `{{0,1},{2,3}}`, as a
      reshaped and transposed range `[2,4]<=[4,2]T(1,0)`, or as mesh axes
      `mesh['a'=2,'b'=4] {'b'}`; a permutation is written as pairs `{{0,1},{1,0}}`.
    count: number of devices of the program, which form one group if no groups are written.
  """
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match.group(1))}
    axes = re.findall(r"'(\w+)'", match.group(2))
    ranges = [range(size if name in axes else 1) for name, size in sizes.items()]
    strides = [math.prod(list(sizes.values())[i + 1 :]) for i in range(len(sizes))]
    return tuple(sum(a * b for a, b in zip(index, strides)) for index in itertools.product(*ranges))
  if match := re.search(
    r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes
  ):
    dims = [int(d) for d in match.group(3).split(',')]
    order = [int(d) for d in (match.group(4) or '').split(',') if d] or list(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    indices = itertools.product(*(range(dims[axis]) for axis in order))
    flat = (sum(a * strides[axis] for a, axis in zip(index, order)) for index in indices)
    return tuple(itertools.islice(flat, int(match.group(2))))
  if match := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', attributes):
    return tuple(int(d) for d in match.group(1).split(','))
  return tuple(range(count))


def _collective_of(
  op: Instruction, scope: dict[str, Instruction], times: float, slice_of: Sequence[int]
) -> Collective | None:
  """The collective of an instruction; None if it is not a collective."""
  kind = op.opcode.removesuffix('-start')
  if kind in KINDS:
    sliced = (other for other in scope.values() if other.opcode == 'dynamic-slice')
    if kind == 'all-reduce' and any(op.name in other.operands for other in sliced):
      kind = 'reduce-scatter'  # compiled as an all-reduce and a slice of it
    return _collective(kind, op, scope, times, slice_of)
  # Between slices, TPU programs send each device's part over the host's network.
  match = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
  if op.opcode != 'recv' or match is None:
    return None
  kind = match.group(1).lower().replace('_', '-')
  slices = len(set(slice_of))
  received = _FACTOR.get(kind, 1.0) * op.shapes[0].bytes * (slices - 1) / slices
  shapes = op.shapes[:1]
  return Collective(kind, op.name, op.op_name, shapes, times, slices, slices, times * received)


def _collective(
  kind: str,
  op: Instruction,
  scope: dict[str, Instruction],
  times: float,
  slice_of: Sequence[int],
) -> Collective:
  group = group_of(op.attributes, len(slice_of))
  operands = sum(scope[name].bytes for name in op.operands if name in scope)
  shapes = op.shapes
  if op.opcode.endswith('-start') and kind != 'all-reduce':
    # The result of a start operation is (operands, results, ...).
    shapes = shapes[len(op.operands) : 2 * len(op.operands)]
  result = sum(shape.bytes for shape in shapes)
  size, slices = len(group), len({slice_of[device] for device in group})
  if kind == 'collective-permute':
    received = result
  else:
    whole = operands or result * size if kind == 'reduce-scatter' else result
    received = _FACTOR.get(kind, 1.0) * whole * (size - 1) / max(size, 1)
  return Collective(kind, op.name, op.op_name, shapes, times, size, slices, times * received)


def _dot_flops(op: Instruction, scope: dict[str, Instruction]) -> float:
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', op.attributes).group(1)
  left = scope[op.operands[0]].shapes[0].dims
  return 2.0 * op.shapes[0].elements * math.prod(left[int(d)] for d in contracted.split(',') if d)


def _convolution_flops(op: Instruction, scope: dict[str, Instruction]) -> float:
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', op.attributes)
  image, kernel, result = labels.groups()
  inputs, weights = (scope[name].shapes[0].dims for name in op.operands[:2])
  out = op.shapes[0].dims
  window = dict(re.findall(r'(\w+)=([^ }]+)', _field(op, 'window') or ''))
  total = 2.0 * out[result.index('b')] * out[result.index('f')] * weights[kernel.index('i')]
  spatial = sorted(d for d in result if d.isdigit())
  values = lambda name, default: (
    window[name].split('x') if name in window else [default] * len(spatial)
  )
  strides, pads = values('stride', '1'), values('pad', '0_0')
  dilations = list(zip(values('lhs_dilate', '1'), values('rhs_dilate', '1'), strict=True))
  for axis, digit in enumerate(spatial):
    total *= window_positions(
      inputs[image.index(digit)],
      weights[kernel.index(digit)],
      out[result.index(digit)],
      int(strides[axis]),
      int(pads[axis].split('_')[0]),
      tuple(map(int, dilations[axis])),
    )
  return total


def _hbm_bytes(program: Program, op: Instruction, scope: dict[str, Instruction]) -> float:
  if op.opcode in _NO_TRAFFIC or op.opcode.endswith('-done'):
    return 0.0
  if op.opcode == 'custom-call' and 'AllocateBuffer' in op.attributes:
    return 0.0
  if op.opcode == 'copy-start':  # the result is (destination, source, context)
    return _in_hbm(op.shapes[:2])
  read, written = _read(op, scope), _in_hbm(op.shapes)
  # The result of most start operations contains their operands.
  if op.opcode.endswith('-start') and op.opcode != 'all-reduce-start':
    written = max(0.0, written - sum(read))
  if op.opcode.removesuffix('-start') in _SLICES:
    return _slice_bytes(op, scope)
  if op.opcode == 'dynamic-update-slice':  # reads the update, and writes it to the array
    return read[1] + (scope[op.operands[1]].bytes if written else 0.0)
  if op.opcode == 'fusion':
    return _fusion_bytes(program.computations[op.called()[0]], read, written)
  return sum(read) + written


def _slice_bytes(op: Instruction, scope: dict[str, Instruction]) -> float:
  """Bytes that a slice reads and writes in HBM; of its operand, only the slice counts."""
  # The result of a start operation is (operands, result, context).
  result = op.shapes[len(op.operands) if op.opcode.endswith('-start') else 0]
  source = op.operands[0]
  reads = source not in scope or bool(_in_hbm(scope[source].shapes))
  return result.bytes * (reads + (not result.on_chip))


def _in_hbm(shapes: Iterable[Shape]) -> float:
  return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _read(op: Instruction, scope: dict[str, Instruction]) -> list[float]:
  """Bytes in HBM of each operand."""
  return [_in_hbm(scope[name].shapes) if name in scope else 0.0 for name in op.operands]


def _fusion_bytes(inside: dict[str, Instruction], read: list[float], written: float) -> float:
  """HBM traffic of a fusion.

  A collective that is overlapped with the fusion's work is excluded, and so are the arrays that the
  fusion passes on for it.

  Args:
    inside: the fused computation.
    read: bytes in HBM of each operand.
    written: bytes in HBM of the results.
  """
  users: dict[str, list[Instruction]] = {}
  for op in inside.values():
    if not (op.is_root and op.opcode == 'tuple') and op.opcode not in KINDS:
      for name in op.operands:
        users.setdefault(name, []).append(op)
  root = next((op for op in inside.values() if op.is_root), None)
  results = [root] if root else []
  if root and root.opcode == 'tuple':
    results = [inside[name] for name in root.operands if name in inside]
  passed_on = (op for op in results if op.opcode in ('parameter', *KINDS))
  total = written - sum(_in_hbm(op.shapes) for op in passed_on)
  for op in inside.values():
    if op.opcode != 'parameter':
      continue
    whole = read[int(op.argument)] if int(op.argument) < len(read) else 0.0
    uses = _uses(op.name, users)
    updates = [user for user, name in uses if _updates(user, name)]
    if all(user.opcode in _SLICES for user, _ in uses):
      whole = min(whole, sum(user.bytes for user, _ in uses))
    elif whole and updates:
      # An in-place update reads and writes only the updated slice.
      total -= min(written, op.bytes)
      whole = min(whole, 2 * sum(inside[user.operands[1]].bytes for user in updates))
    total += whole
  return max(total, 0.0)


def _uses(name: str, users: Mapping[str, list[Instruction]]) -> list[tuple[Instruction, str]]:
  """Instructions that read a value or a bitcast of it, each with the name of the operand."""
  uses = []
  for user in users.get(name, []):
    uses += _uses(user.name, users) if user.opcode == 'bitcast' else [(user, name)]
  return uses


def _updates(user: Instruction, name: str) -> bool:
  return user.opcode == 'dynamic-update-slice' and user.operands[0] == name


def _field(op: Instruction, name: str) -> str | None:
  match = re.search(rf'\b{name}=(\{{[^}}]*\}}|[^,\s]+)', op.attributes)
  return match.group(1).strip('{}') if match else None
