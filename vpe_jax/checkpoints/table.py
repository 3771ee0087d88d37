"""How one family's published tensors become our parameters, and back: rows of plain data.

A `Row` ties a source key to a target path and says how their axes relate, in einops' words; the
same words are read backwards on export. A `Table` is what a file in `tables/` holds.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import einops
import numpy as np

_NUMBER = re.compile(r'\{(\w+)\}')


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of source tensor.

  Attributes:
    source: its key; `{n}` stands for a number, such as that of a layer.
    target: path of the leaf that it fills. A number that the target doesn't name is an entry of
      the leaf's first axis: layers are stacked there. Several targets share the source tensor,
      cut along its first axis in this order (a fused `qkv`).
    axes: `source axes -> target axes` without the stacked one, such as `(N H) D -> D N H`; empty
      where both are alike.
    last: axis of the source of which only the last entry is used (a causal convolution in time
      that sees one frame); such a row can't be exported.
  """

  source: str
  target: str | tuple[str, ...]
  axes: str = ''
  last: str = ''

  @property
  def targets(self) -> tuple[str, ...]:
    """Paths of the leaves that the tensor fills."""
    return (self.target,) if isinstance(self.target, str) else self.target

  @property
  def stacked(self) -> str:
    """Name of the number that counts entries of the target's first axis; '' where there is none."""
    names = [name for name in _NUMBER.findall(self.source) if f'{{{name}}}' not in self.targets[0]]
    return names[0] if names else ''


@dataclasses.dataclass(frozen=True)
class Table:
  """All rows of one key layout of a family.

  Attributes:
    name: of the layout, for reports and errors.
    rows: each source key matches exactly one of them.
    ignored: (regular expression over source keys, reason): tensors that we have no use for.
    absent: (regular expression over target paths, reason): leaves that no source tensor fills.
    ties: (key, key): where both are there, they must hold the same numbers, and the first is
      dropped; unless our network has a leaf of its own for the first (an untied output).
    prefixes: beginnings that all source keys may have in common; they are taken off.
  """

  name: str
  rows: tuple[Row, ...]
  ignored: tuple[tuple[str, str], ...] = ()
  absent: tuple[tuple[str, str], ...] = ()
  ties: tuple[tuple[str, str], ...] = ()
  prefixes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a source tensor goes: a row with its numbers put in.

  Attributes:
    row: the row that its key matches.
    targets: paths of the leaves.
    index: entry of their first axis (None: the whole leaf).
  """

  row: Row
  targets: tuple[str, ...]
  index: int | None


def place(table: Table, key: str) -> Place | None:
  """Where the tensor of a source key goes; None if no row matches it.

  Raises:
    ValueError: two rows match: the table is wrong.
  """
  found = []
  for row in table.rows:
    match = _pattern(row.source).fullmatch(key)
    if match is None:
      continue
    numbers = match.groupdict()
    index = int(numbers.pop(row.stacked)) if row.stacked else None
    found.append(Place(row, tuple(target.format(**numbers) for target in row.targets), index))
  if len(found) > 1:
    rows = ' and '.join(repr(one.row.source) for one in found)
    raise ValueError(f"table '{table.name}' has two rows for '{key}': {rows}")
  return found[0] if found else None


def reason(listed: Sequence[tuple[str, str]], name: str) -> str | None:
  """Why a key or path is listed as ignored or absent; None where it isn't."""
  return next((why for pattern, why in listed if re.fullmatch(pattern, name)), None)


def keys(row: Row, leaves: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Place]]:
  """The source keys that a row stands for in a tree of leaves (path -> shape), and their places."""
  pattern = _pattern(row.targets[0])
  for path, shape in leaves.items():
    match = pattern.fullmatch(path)
    if match is None:
      continue
    numbers = match.groupdict()
    targets = tuple(target.format(**numbers) for target in row.targets)
    if not row.stacked:
      yield row.source.format(**numbers), Place(row, targets, None)
      continue
    for index in range(shape[0]):
      yield row.source.format(**numbers, **{row.stacked: index}), Place(row, targets, index)


def misfit(place: Place, source: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> str:
  """Why a source tensor of this shape can't go there, in words; '' where it can.

  Args:
    place: where the tensor goes.
    source: its shape.
    shapes: of its targets, without the stacked axis.
  """
  axes, source = _without_last(place.row, source)
  try:
    if len(shapes) == 1:
      _solve(axes, source, shapes[0])
    else:
      _ends(axes, source, shapes)
  except ValueError as error:
    return str(error)
  return ''


def forward(
  place: Place, tensor: np.ndarray, shapes: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
  """What a source tensor puts into each of its targets; views where axes allow.

  Args:
    place: where the tensor goes.
    tensor: the source tensor.
    shapes: of its targets, without the stacked axis.

  Raises:
    ValueError: the tensor's shape doesn't fit.
  """
  row = place.row
  axes, _ = _without_last(row, tensor.shape)
  if row.last:
    tensor = np.take(tensor, -1, _named(row).index(row.last))
  cuts = [tensor]
  if len(shapes) > 1:
    cuts = np.split(tensor, _ends(axes, tensor.shape, shapes)[:-1])
  made = []
  for cut, shape in zip(cuts, shapes, strict=True):
    sizes = _solve(axes, cut.shape, shape)
    made.append(einops.rearrange(cut, axes, **sizes) if axes else cut)
  return made


def backward(place: Place, leaves: Sequence[np.ndarray], axes: Mapping[str, int]) -> np.ndarray:
  """The source tensor from what its targets hold (without the stacked axis).

  Args:
    place: where the tensor went.
    leaves: what its targets hold.
    axes: sizes of axes by name, where our leaves don't show them.

  Raises:
    ValueError: the row uses a part of the source tensor only.
  """
  row = place.row
  if row.last:
    raise ValueError(f"'{row.source}' can't be exported: we keep only a part of it")
  parts = [_reversed(row.axes, leaf, axes) for leaf in leaves]
  return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _pattern(template: str) -> re.Pattern[str]:
  """The template as a regular expression: literal but for its numbers."""
  parts, seen = [], set()
  for part in re.split(r'(\{\w+\})', template):
    number = _NUMBER.fullmatch(part)
    if number is None:
      parts.append(re.escape(part))
    else:
      name = number.group(1)
      parts.append(f'(?P={name})' if name in seen else f'(?P<{name}>\\d+)')
      seen.add(name)
  return re.compile(''.join(parts))


def _groups(side: str) -> list[tuple[str, ...]]:
  """The axes of one side of a pattern: `(N H) D` -> [('N', 'H'), ('D',)]."""
  return [tuple(part.strip('()').split()) for part in re.findall(r'\([^)]*\)|\S+', side)]


def _named(row: Row) -> list[str]:
  return row.axes.split('->')[0].split()


def _without_last(row: Row, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
  """The axes and the source shape once only the last entry of `row.last` is left."""
  if not row.last:
    return row.axes, tuple(shape)
  names = _named(row)
  if len(names) != len(shape):
    return row.axes, tuple(shape)  # `_solve` says what is wrong.
  kept = [(name, size) for name, size in zip(names, shape) if name != row.last]
  axes = f'{" ".join(name for name, _ in kept)} ->{row.axes.split("->")[1]}'
  return axes, tuple(size for _, size in kept)


def _solve(axes: str, source: Sequence[int], target: Sequence[int]) -> dict[str, int]:
  """Sizes of all axes, from both shapes.

  Raises:
    ValueError: no sizes fit both.
  """
  misfit = ValueError(f'{list(source)} does not become {list(target)}' + (axes and f' by {axes}'))
  if not axes:
    if tuple(source) != tuple(target):
      raise misfit
    return {}
  sides = [_groups(side) for side in axes.split('->')]
  if [len(side) for side in sides] != [len(source), len(target)]:
    raise misfit
  groups = [*zip(sides[0], source), *zip(sides[1], target)]
  sizes: dict[str, int] = {}
  for _ in groups:  # Each pass can settle what the one before left open.
    for group, total in groups:
      known = math.prod(int(name) if name.isdigit() else sizes.get(name, 1) for name in group)
      open_ = [name for name in group if not name.isdigit() and name not in sizes]
      if len(open_) == 1 and known and total % known == 0:
        sizes[open_[0]] = total // known
      elif not open_ and known != total:
        raise misfit
  if any(name not in sizes for group, _ in groups for name in group if not name.isdigit()):
    raise misfit
  return sizes


def _reversed(axes: str, leaf: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
  if not axes:
    return leaf
  left, right = axes.split('->')
  grouped = {name for group in _groups(right) if len(group) > 1 for name in group}
  known = {name: size for name, size in sizes.items() if name in grouped}
  return einops.rearrange(leaf, f'{right} -> {left}', **known)


def _ends(axes: str, source: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[int]:
  """Where the shares of several targets end in the source's first axis.

  Raises:
    ValueError: the shares don't add up to the source.
  """
  ends, total = [], 0
  first = _groups(axes.split('->')[0])[0] if axes else ()
  for shape in shapes:
    # The share's rows: what its own shape says of the first source axis.
    rows = shape[0]
    if axes:
      right = _groups(axes.split('->')[1])
      alone = {group[0]: size for group, size in zip(right, shape) if len(group) == 1}
      if len(right) != len(shape) or any(name not in alone for name in first):
        raise ValueError(f"{list(shape)} doesn't say how many rows of {list(source)} it takes")
      rows = math.prod(alone[name] for name in first)
    _solve(axes, (rows, *source[1:]), shape)
    total += rows
    ends.append(total)
  if not source or total != source[0]:
    raise ValueError(f'{list(source)} is cut into {total} rows for {len(shapes)} targets')
  return ends
