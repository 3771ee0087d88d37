"""Tables that map a family's published tensors to our parameters and back, as plain data.

The source is the published tensors, by key; the target is our parameters, by path. A `Row` maps a
source key to a target path, with an einops pattern for the axes, which an export applies in
reverse. A file in `tables/` defines the `Table`s of each family.
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
    source: template of the tensor's key; `{n}` stands for a number, such as a layer index.
    target: path template of the leaf that the tensor fills. A number in `source` that `target`
      doesn't contain is an index into the leaf's first axis, along which layers are stacked. With
      several targets, the tensor is split along its first axis in their order (a fused `qkv`).
    axes: einops pattern `source axes -> target axes` without the stacked axis, such as
      `(N H) D -> D N H`; empty if the axes are equal. O and I are outputs and inputs of a layer, p
      and q height and width of a kernel, t time; vpe_jax/contracts.py defines the other letters.
    last: source axis of which only the last index is used (a causal convolution in time that sees
      one frame). Such a row can't be exported.
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
    """Name of the number that indexes the target's first axis; '' if layers are not stacked."""
    names = [name for name in _NUMBER.findall(self.source) if f'{{{name}}}' not in self.targets[0]]
    return names[0] if names else ''


@dataclasses.dataclass(frozen=True)
class Table:
  """A key layout of a family: the tensor names of one publisher, as rows.

  Attributes:
    name: name of the layout in reports and errors.
    rows: a source key matches at most one row.
    ignored: (regular expression over source keys, reason) of tensors that are not used.
    absent: (regular expression over target paths, reason) of leaves that no source tensor fills.
    ties: pairs of keys of tied tensors. If both exist, they must be equal and the first is dropped,
      unless our network has a separate leaf for the first (an untied output).
    prefixes: prefixes that all source keys may share; the first shared one is removed from them.
  """

  name: str
  rows: tuple[Row, ...]
  ignored: tuple[tuple[str, str], ...] = ()
  absent: tuple[tuple[str, str], ...] = ()
  ties: tuple[tuple[str, str], ...] = ()
  prefixes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Destination:
  """The destination of a source tensor: a row with its numbers filled in.

  Attributes:
    row: the row that matches the key.
    targets: paths of the leaves that the tensor fills.
    index: index into the first axis of these leaves (None: the tensor fills whole leaves).
  """

  row: Row
  targets: tuple[str, ...]
  index: int | None


def destination(table: Table, key: str) -> Destination | None:
  """Finds the destination of a source key; None if no row matches.

  Raises:
    ValueError: two rows match, so the table is wrong.
  """
  matches = []
  for row in table.rows:
    match = _pattern(row.source).fullmatch(key)
    if match is None:
      continue
    numbers = match.groupdict()
    index = int(numbers.pop(row.stacked)) if row.stacked else None
    matches.append(
      Destination(row, tuple(target.format(**numbers) for target in row.targets), index)
    )
  if len(matches) > 1:
    rows = ' and '.join(repr(match.row.source) for match in matches)
    raise ValueError(f"table '{table.name}' has two rows for '{key}': {rows}")
  return matches[0] if matches else None


def reason(rules: Sequence[tuple[str, str]], name: str) -> str | None:
  """The reason why a key or path is ignored or absent; None if no rule matches.

  Args:
    rules: (regular expression, reason), as in `Table.ignored` and `Table.absent`.
    name: source key or target path.
  """
  return next((why for pattern, why in rules if re.fullmatch(pattern, name)), None)


def keys(row: Row, leaves: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Destination]]:
  """Yields (source key, destination) of all tensors that a row expects.

  Args:
    row: a row of a table.
    leaves: path -> shape of each of our parameters.
  """
  pattern = _pattern(row.targets[0])
  for path, shape in leaves.items():
    match = pattern.fullmatch(path)
    if match is None:
      continue
    numbers = match.groupdict()
    targets = tuple(target.format(**numbers) for target in row.targets)
    if not row.stacked:
      yield row.source.format(**numbers), Destination(row, targets, None)
      continue
    for index in range(shape[0]):
      yield row.source.format(**numbers, **{row.stacked: index}), Destination(row, targets, index)


def misfit(
  destination: Destination, source: Sequence[int], shapes: Sequence[tuple[int, ...]]
) -> str:
  """Explains why a source shape doesn't fit its targets; '' if it does.

  Args:
    destination: row and targets of the source tensor.
    source: shape of the source tensor.
    shapes: shapes of the targets, without the stacked axis.
  """
  axes, source = _without_last(destination.row, source)
  try:
    if len(shapes) == 1:
      _solve(axes, source, shapes[0])
    else:
      _ends(axes, source, shapes)
  except ValueError as error:
    return str(error)
  return ''


def forward(
  destination: Destination, tensor: np.ndarray, shapes: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
  """Converts a source tensor to the arrays of its targets; views where possible.

  Args:
    destination: row and targets of the source tensor.
    tensor: the source tensor.
    shapes: shapes of the targets, without the stacked axis.

  Raises:
    ValueError: the tensor's shape doesn't fit.
  """
  row = destination.row
  axes, _ = _without_last(row, tensor.shape)
  if row.last:
    tensor = np.take(tensor, -1, _source_axes(row).index(row.last))
  parts = [tensor]
  if len(shapes) > 1:
    parts = np.split(tensor, _ends(axes, tensor.shape, shapes)[:-1])
  arrays = []
  for part, shape in zip(parts, shapes, strict=True):
    sizes = _solve(axes, part.shape, shape)
    arrays.append(einops.rearrange(part, axes, **sizes) if axes else part)
  return arrays


def backward(
  destination: Destination, leaves: Sequence[np.ndarray], axes: Mapping[str, int]
) -> np.ndarray:
  """Converts the arrays of the targets back to the source tensor.

  Args:
    destination: row and targets of the source tensor.
    leaves: arrays of the targets, without the stacked axis.
    axes: axis letter -> size, for axes whose size can't be inferred from our leaves.

  Raises:
    ValueError: the row uses only a part of the source tensor.
  """
  row = destination.row
  if row.last:
    raise ValueError(f"'{row.source}' can't be exported: only a part of it was imported")
  parts = [_reverse(row.axes, leaf, axes) for leaf in leaves]
  return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _pattern(template: str) -> re.Pattern[str]:
  """Compiles a key or path template to a regular expression with a group for each number."""
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
  """Parses one side of an einops pattern: `(N H) D` -> [('N', 'H'), ('D',)]."""
  return [tuple(part.strip('()').split()) for part in re.findall(r'\([^)]*\)|\S+', side)]


def _source_axes(row: Row) -> list[str]:
  return row.axes.split('->')[0].split()


def _without_last(row: Row, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
  """The einops pattern and the source shape without the axis `row.last`."""
  if not row.last:
    return row.axes, tuple(shape)
  names = _source_axes(row)
  if len(names) != len(shape):
    return row.axes, tuple(shape)  # `_solve` raises the error.
  remaining = [(name, size) for name, size in zip(names, shape) if name != row.last]
  axes = f'{" ".join(name for name, _ in remaining)} ->{row.axes.split("->")[1]}'
  return axes, tuple(size for _, size in remaining)


def _solve(axes: str, source: Sequence[int], target: Sequence[int]) -> dict[str, int]:
  """Solves for the sizes of all axes, given both shapes.

  Raises:
    ValueError: no sizes fit both shapes.
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
  for _ in groups:  # A size found in one pass may determine others in the next.
    for group, total in groups:
      known = math.prod(int(name) if name.isdigit() else sizes.get(name, 1) for name in group)
      unknown = [name for name in group if not name.isdigit() and name not in sizes]
      if len(unknown) == 1 and known and total % known == 0:
        sizes[unknown[0]] = total // known
      elif not unknown and known != total:
        raise misfit
  if any(name not in sizes for group, _ in groups for name in group if not name.isdigit()):
    raise misfit
  return sizes


def _reverse(axes: str, leaf: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
  if not axes:
    return leaf
  left, right = axes.split('->')
  grouped = {name for group in _groups(right) if len(group) > 1 for name in group}
  known = {name: size for name, size in sizes.items() if name in grouped}
  return einops.rearrange(leaf, f'{right} -> {left}', **known)


def _ends(axes: str, source: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[int]:
  """End index of each target's part along the first axis of the source.

  Raises:
    ValueError: a target doesn't determine the size of its part, or the sizes don't add up.
  """
  ends, total = [], 0
  first = _groups(axes.split('->')[0])[0] if axes else ()
  for shape in shapes:
    # Length of the part, which follows from the target's shape.
    length = shape[0]
    if axes:
      right = _groups(axes.split('->')[1])
      sizes = {group[0]: size for group, size in zip(right, shape) if len(group) == 1}
      if len(right) != len(shape) or any(name not in sizes for name in first):
        raise ValueError(f'target {list(shape)} does not determine its part of {list(source)}')
      length = math.prod(sizes[name] for name in first)
    _solve(axes, (length, *source[1:]), shape)
    total += length
    ends.append(total)
  if not source or total != source[0]:
    raise ValueError(
      f'{len(shapes)} targets need {total} entries, but the source has shape {list(source)}'
    )
  return ends
