"""The report at the start of a run: devices, parameters, memory, data, and where things go."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vpe_jax.config import OptimConfig
from vpe_jax.contracts import Examples, Params, Stage
from vpe_jax.sharding import by_path
from vpe_jax.training.state import split_trainable

_MEBI = 2**20


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device, as the compiler planned them for the step."""

  arguments: int
  outputs: int
  aliased: int
  temporary: int
  code: int

  @property
  def total(self) -> int:
    """The most that is alive at once: results that reuse an argument's buffer count once."""
    return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def memory_of(compiled: jax.stages.Compiled) -> Memory | None:
  """The memory of a compiled step (None where the backend does not say)."""
  found = compiled.memory_analysis()
  if found is None:
    return None
  return Memory(
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
    found.temp_size_in_bytes,
    found.generated_code_size_in_bytes,
  )


def devices_text(mesh: jax.sharding.Mesh) -> str:
  """Devices, processes and the mesh."""
  axes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return (
    f'devices: {jax.device_count()} x {jax.devices()[0].device_kind} '
    f'in {jax.process_count()} process(es); mesh: {axes}'
  )


def parameters_text(
  params: Params,
  frozen: Mapping[str, Params],
  sources: Mapping[str, str],
  stage: Stage,
  optim: OptimConfig,
) -> str:
  """The table of parameter groups of one stage, frozen networks included.

  Args:
    params: parameters (arrays or shapes with shardings).
    frozen: frozen networks by name.
    sources: frozen network -> where its weights came from.
    stage: which leaves train, and where the parameters came from.
    optim: gives the learning rate.
  """
  trainable, _ = split_trainable(params, stage)
  trains = by_path(trainable).keys()
  groups: dict[tuple[str, bool], list[Any]] = {}
  for path, leaf in by_path(params).items():
    groups.setdefault((path.split('/')[0], path in trains), []).append(leaf)
  rows = [('group', 'parameters', 'state', 'rate', 'dtype', 'sharding', 'source')]
  for (name, is_trained), leaves in groups.items():
    state = ('trains', f'{optim.lr:g}') if is_trained else ('frozen', '-')
    rows.append((name, _count(leaves), *state, *_kinds(leaves), stage.source))
  for name, tree in frozen.items():
    leaves = jax.tree.leaves(tree)
    rows.append((name, _count(leaves), 'frozen', '-', *_kinds(leaves), sources[name]))
  return _table(rows)


def memory_text(memory: Memory | None) -> str:
  """The memory line."""
  if memory is None:
    return 'memory: this backend does not report it'
  return (
    f'memory per device: {memory.total / _MEBI:,.1f} MiB in the compiled step '
    f'(state, frozen networks and batch {memory.arguments / _MEBI:,.1f}, '
    f'temporaries {memory.temporary / _MEBI:,.1f})'
  )


def sample_text(batch: Examples, caption: str) -> str:
  """One data sample: its caption and the shapes of the whole batch."""
  shapes = ', '.join(
    f'{field.name} {list(value.shape)} {np.dtype(value.dtype).name}'
    for field in dataclasses.fields(batch)
    if (value := getattr(batch, field.name)) is not None
  )
  return f'data: {shapes}\n  first caption: {caption!r}'


def _count(leaves: list[Any]) -> str:
  return f'{sum(int(np.prod(leaf.shape)) for leaf in leaves):,}'


def _kinds(leaves: list[Any]) -> tuple[str, str]:
  """Dtypes, and shardings by the share of parameters that has them, largest first."""
  dtypes = '/'.join(sorted({np.dtype(leaf.dtype).name for leaf in leaves}))
  specs: Counter[str] = Counter()
  for leaf in leaves:
    specs[_spec(leaf)] += int(np.prod(leaf.shape))
  total = max(sum(specs.values()), 1)
  common = [f'{spec} {size / total:.0%}' for spec, size in specs.most_common(2)]
  return dtypes, ', '.join(common)


def _spec(leaf: Any) -> str:
  spec = getattr(getattr(leaf, 'sharding', None), 'spec', ())
  named = [str(axis) if axis else '-' for axis in spec]
  return f'({" ".join(named)})' if any(axis != '-' for axis in named) else 'replicated'


def _table(rows: list[tuple[str, ...]]) -> str:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for row in rows:
    cells = [
      cell.rjust(width) if index == 1 else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append('  ' + '  '.join(cells).rstrip())
  return '\n'.join(lines)
