"""What a compiled program does in one call, on one chip: FLOPs, HBM bytes, and collectives.

Everything is counted as often as it runs: a loop's body is multiplied by its trip count.

FLOPs: dots and convolutions only (TPU programs write dots as convolutions); a multiply-add is two.
Of a convolution, only positions inside the (dilated, unpadded) input count, as in XLA's own
analysis; without this the batched dots that TPU programs write as dilated convolutions would count
several times.

HBM bytes: operands and results of every instruction and fusion that lie in HBM. What a fusion
reads by slices, or writes into a larger array in place, counts by the slice.

Collectives: bytes that one chip receives, with n chips in a group and S the bytes of the whole
array (an all-gather's result, any other's operand): all-gather, reduce-scatter and all-to-all
S (n-1)/n, all-reduce 2 S (n-1)/n (a reduce-scatter and an all-gather), collective-permute S. A
collective that the compiler has cut over several fusions to overlap it with their work keeps its
channel id in all of them. It counts once, as often as the one that runs least (a loop may carry it
on in every turn), and so do the arrays that it hands from one to the next.
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
# What moves no bytes of its own: names of values, loops (their bodies are counted), and the second
# half of what runs asynchronously.
_FREE = {
  'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call',
  'after-all', 'partition-id', 'replica-id', 'iota', 'opt-barrier', 'copy-done', 'async-start',
  'async-update', 'async-done', 'add-dependency', 'rng-get-and-update-state',
}  # fmt: skip
MOVERS = 8  # of HBM bytes, that are named
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective.

  Attributes:
    kind: a word of KINDS.
    name: of the instruction.
    op_name: where in the Python program it comes from.
    shapes: of its result.
    times: how often it runs.
    size: chips in a group.
    slices: slices that a group spans.
    bytes: what one chip receives over all runs.
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
    """What one chip receives from other slices, if they share the work evenly.

    Each slice needs the (slices - 1) / slices of the array that the others hold, once; its
    size / slices chips of the group take equal parts.
    """
    if self.slices == 1:
      return 0.0
    whole = self.bytes / (self.size - 1) * self.size
    return whole * (self.slices - 1) / self.slices / (self.size / self.slices)


@dataclasses.dataclass(frozen=True)
class Work:
  """One call of a program on one chip.

  Attributes:
    flops: of its dots and convolutions.
    hbm_bytes: read and written.
    collectives: each channel once.
    kernels: times that a custom kernel runs (Pallas), whose FLOPs the text doesn't show.
    unknown_loops: loops whose bodies are counted once for want of a trip count.
    movers: (where in the Python program, its share of `hbm_bytes`), most first.
  """

  flops: float
  hbm_bytes: float
  collectives: tuple[Collective, ...]
  kernels: float
  unknown_loops: tuple[str, ...]
  movers: tuple[tuple[str, float], ...] = ()

  def collective_bytes(self) -> dict[str, float]:
    """Bytes that one chip receives, by kind."""
    total: dict[str, float] = {}
    for one in self.collectives:
      total[one.kind] = total.get(one.kind, 0.0) + one.bytes
    return total


def work_of(program: Program, slice_of: Sequence[int]) -> Work:
  """Counts a program.

  Args:
    program: as `hlo.parse` gives it.
    slice_of: for each chip, in the order of the program's partitions, the slice that it is in.
  """
  flops = kernels = 0.0
  channels: dict[str, Collective] = {}
  moved: Counter[str] = Counter()
  overlapped: dict[str, tuple[str, float]] = {}
  for name, times, fused in program.runs():
    scope = program.computations[name]
    for one in scope.values():
      if one.opcode == 'convolution':
        flops += times * _convolution_flops(one, scope)
      elif one.opcode == 'dot':
        flops += times * _dot_flops(one, scope)
      elif one.opcode == 'custom-call' and 'tpu_custom_call' in one.attributes:
        kernels += times
      found = _received(one, scope, times, slice_of)
      if found is not None:
        channel = f'{found.kind} {_field(one, "channel_id") or f"{name}/{one.name}"}'
        before = channels.get(channel)
        if before is None or found.times < before.times:
          channels[channel] = found
          if fused:
            # Of a reduce-scatter the fusion's own result is the part that is written.
            result = _in_hbm(one.shapes) if found.kind == one.opcode else 0.0
            count = times * (sum(_read(one, scope)) + result)
            overlapped[channel] = (one.op_name or one.name, count)
      if not fused:
        moved[one.op_name or one.name] += times * _hbm_bytes(program, one, scope)
  for where, count in overlapped.values():
    moved[where] += count
  unknown = tuple(program.unknown_loops())
  movers = tuple(moved.most_common(MOVERS))
  return Work(flops, sum(moved.values()), tuple(channels.values()), kernels, unknown, movers)


def group_of(attributes: str, count: int) -> tuple[int, ...]:
  """The first group of chips that a collective joins.

  Args:
    attributes: of the instruction. Groups are written as lists `{{0,1},{2,3}}`, as a reshaped and
      transposed range `[2,4]<=[4,2]T(1,0)`, or by axes of a mesh `mesh['a'=2,'b'=4] {'b'}`; a
      permutation as pairs `{{0,1},{1,0}}`.
    count: chips of the program; without any groups they all are one.
  """
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
    joined = re.findall(r"'(\w+)'", found.group(2))
    ranges = [range(size if name in joined else 1) for name, size in sizes.items()]
    steps = [math.prod(list(sizes.values())[i + 1 :]) for i in range(len(sizes))]
    return tuple(sum(a * b for a, b in zip(place, steps)) for place in itertools.product(*ranges))
  if found := re.search(
    r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes
  ):
    dims = [int(d) for d in found.group(3).split(',')]
    order = [int(d) for d in (found.group(4) or '').split(',') if d] or list(range(len(dims)))
    steps = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    places = itertools.product(*(range(dims[axis]) for axis in order))
    flat = (sum(a * steps[axis] for a, axis in zip(place, order)) for place in places)
    return tuple(itertools.islice(flat, int(found.group(2))))
  if found := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', attributes):
    return tuple(int(d) for d in found.group(1).split(','))
  return tuple(range(count))


def _received(
  one: Instruction, scope: dict[str, Instruction], times: float, slice_of: Sequence[int]
) -> Collective | None:
  """The collective that an instruction is, or None."""
  kind = one.opcode.removesuffix('-start')
  if kind in KINDS:
    sliced = (other for other in scope.values() if other.opcode == 'dynamic-slice')
    if kind == 'all-reduce' and any(one.name in other.operands for other in sliced):
      kind = 'reduce-scatter'  # how TPU programs write it, as a fusion of the two
    return _collective(kind, one, scope, times, slice_of)
  # Between slices, TPU programs hand one chip's part to the host's network.
  sent = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
  if one.opcode != 'recv' or sent is None:
    return None
  kind = sent.group(1).lower().replace('_', '-')
  slices = len(set(slice_of))
  received = _FACTOR.get(kind, 1.0) * one.shapes[0].bytes * (slices - 1) / slices
  shapes = one.shapes[:1]
  return Collective(kind, one.name, one.op_name, shapes, times, slices, slices, times * received)


def _collective(
  kind: str,
  one: Instruction,
  scope: dict[str, Instruction],
  times: float,
  slice_of: Sequence[int],
) -> Collective:
  group = group_of(one.attributes, len(slice_of))
  given = sum(scope[name].bytes for name in one.operands if name in scope)
  shapes = one.shapes
  if one.opcode.endswith('-start') and kind != 'all-reduce':
    # The result is (operands, results, ...).
    shapes = shapes[len(one.operands) : 2 * len(one.operands)]
  result = sum(shape.bytes for shape in shapes)
  size, spanned = len(group), len({slice_of[chip] for chip in group})
  if kind == 'collective-permute':
    received = result
  else:
    whole = given or result * size if kind == 'reduce-scatter' else result
    received = _FACTOR.get(kind, 1.0) * whole * (size - 1) / max(size, 1)
  return Collective(kind, one.name, one.op_name, shapes, times, size, spanned, times * received)


def _dot_flops(one: Instruction, scope: dict[str, Instruction]) -> float:
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', one.attributes).group(1)
  left = scope[one.operands[0]].shapes[0].dims
  return 2.0 * one.shapes[0].elements * math.prod(left[int(d)] for d in contracted.split(',') if d)


def _convolution_flops(one: Instruction, scope: dict[str, Instruction]) -> float:
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', one.attributes)
  image, kernel, result = labels.groups()
  given, weights = (scope[name].shapes[0].dims for name in one.operands[:2])
  out = one.shapes[0].dims
  window = dict(re.findall(r'(\w+)=([^ }]+)', _field(one, 'window') or ''))
  total = 2.0 * out[result.index('b')] * out[result.index('f')] * weights[kernel.index('i')]
  spatial = sorted(d for d in result if d.isdigit())
  part = lambda name, default: (
    window[name].split('x') if name in window else [default] * len(spatial)
  )
  strides, pads = part('stride', '1'), part('pad', '0_0')
  dilations = list(zip(part('lhs_dilate', '1'), part('rhs_dilate', '1'), strict=True))
  for place, digit in enumerate(spatial):
    total *= window_positions(
      given[image.index(digit)],
      weights[kernel.index(digit)],
      out[result.index(digit)],
      int(strides[place]),
      int(pads[place].split('_')[0]),
      tuple(map(int, dilations[place])),
    )
  return total


def _hbm_bytes(program: Program, one: Instruction, scope: dict[str, Instruction]) -> float:
  if one.opcode in _FREE or one.opcode.endswith('-done'):
    return 0.0
  if one.opcode == 'custom-call' and 'AllocateBuffer' in one.attributes:
    return 0.0
  if one.opcode == 'copy-start':  # the result is (destination, source, context)
    return _in_hbm(one.shapes[:2])
  read, written = _read(one, scope), _in_hbm(one.shapes)
  if one.opcode.endswith('-start'):
    written = max(0.0, written - sum(read))
  if one.opcode in _SLICES:
    return 2 * written
  if one.opcode == 'dynamic-update-slice':
    return 2 * read[1]
  if one.opcode == 'fusion':
    return _fusion_bytes(program.computations[one.called()[0]], read, written)
  return sum(read) + written


def _in_hbm(shapes: Iterable[Shape]) -> float:
  return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _read(one: Instruction, scope: dict[str, Instruction]) -> list[float]:
  """Bytes of each operand that lie in HBM."""
  return [_in_hbm(scope[name].shapes) if name in scope else 0.0 for name in one.operands]


def _fusion_bytes(inside: dict[str, Instruction], read: list[float], written: float) -> float:
  """What a fusion moves, of operands that hold `read` bytes each and results of `written` bytes.

  A collective that is carried on beside its work is left out, with what is handed on for it.
  """
  users: dict[str, list[Instruction]] = {}
  for one in inside.values():
    if not (one.is_root and one.opcode == 'tuple') and one.opcode not in KINDS:
      for name in one.operands:
        users.setdefault(name, []).append(one)
  root = next((one for one in inside.values() if one.is_root), None)
  results = [root] if root else []
  if root and root.opcode == 'tuple':
    results = [inside[name] for name in root.operands if name in inside]
  handed_on = (one for one in results if one.opcode in ('parameter', *KINDS))
  total = written - sum(_in_hbm(one.shapes) for one in handed_on)
  for one in inside.values():
    if one.opcode != 'parameter':
      continue
    whole = read[int(one.argument)] if int(one.argument) < len(read) else 0.0
    uses = _uses(one.name, users)
    updated = [user for user, name in uses if _updates(user, name)]
    if all(user.opcode in _SLICES for user, _ in uses):
      whole = min(whole, sum(user.bytes for user, _ in uses))
    elif whole and updated:
      # Written in place: neither read nor written but where the update goes.
      total -= min(written, one.bytes)
      whole = min(whole, 2 * sum(inside[user.operands[1]].bytes for user in updated))
    total += whole
  return max(total, 0.0)


def _uses(name: str, users: Mapping[str, list[Instruction]]) -> list[tuple[Instruction, str]]:
  """What reads a value, under that name or as a bitcast of it, and the name that it reads."""
  found = []
  for user in users.get(name, []):
    found += _uses(user.name, users) if user.opcode == 'bitcast' else [(user, name)]
  return found


def _updates(user: Instruction, name: str) -> bool:
  return user.opcode == 'dynamic-update-slice' and user.operands[0] == name


def _field(one: Instruction, name: str) -> str | None:
  found = re.search(rf'\b{name}=(\{{[^}}]*\}}|[^,\s]+)', one.attributes)
  return found.group(1).strip('{}') if found else None
