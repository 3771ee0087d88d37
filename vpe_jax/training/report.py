"""The report at the start of a run: devices, parameters, memory, data, and where things go."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vpe_jax.config import Config, OptimConfig
from vpe_jax.contracts import Batch, Params, Stage
from vpe_jax.sharding import by_path
from vpe_jax.training import optimizer
from vpe_jax.training.state import split_trainable

_MEBI = 2**20
SHOWN = 3  # kinds of sharding, or places that a group's parameters are from, that a row shows


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


def stage_text(stage: Stage, config: Config, index: int) -> str:
  """What a stage does: its place in the run, steps, rate, average, losses and their weights."""
  optim, count = config.optim_of(index), len(config.stages)
  place = f' ({index + 1} of {count})' if count > 1 else ''
  average = f'averages at {optim.ema:g}' if stage.ema else 'keeps no average'
  drives = {name: weight for name, weight in stage.losses.items() if weight != 0.0}
  shown = ', '.join(
    f'{name} x {weight:g}' if isinstance(weight, (int, float)) else f'{name} x {weight}'
    for name, weight in drives.items()
  )
  logged = [name for name in stage.losses if name not in drives]
  also = ''.join(
    f'; {words}: {", ".join(names)}'
    for words, names in (('logged', logged), ('held out alone', stage.monitored))
    if names
  )
  return (
    f'stage {stage.name}{place}: {config.steps[index]:,} steps of {config.batch_size[index]:,} '
    f'examples, {optim.name} at rate {_rate_text(optim)}, {average}\n'
    f'  losses: {shown}{also}'
  )


def _rate_text(optim: OptimConfig) -> str:
  """The learning rate of a stage: its peak, warm-up and decay."""
  warmup = f'{optim.lr:g} after {optim.warmup:,} steps of warm-up'
  if optim.schedule == 'constant':
    return warmup
  length = '' if optim.schedule == 'rsqrt' else f' at step {optim.decay_steps:,}'
  return f'{warmup}, then {optim.schedule} to {optim.lr_end:g}{length}'


def origins_after(stages: Sequence[Stage], first: Mapping[str, str]) -> dict[str, str]:
  """Where each parameter is from once stages have run: the last that trained it, else as before."""
  found = dict(first)
  for stage in stages:
    found |= {path: f'stage {stage.name}' for path in found if stage.trains(path)}
  return found


@dataclasses.dataclass(frozen=True)
class Networks:
  """Frozen networks by name, and where the weights of each are from."""

  params: Mapping[str, Params]
  sources: Mapping[str, str]


def parameters_text(
  params: Params, networks: Networks, stage: Stage, optim: OptimConfig, origins: Mapping[str, str]
) -> str:
  """The table of parameter groups of one stage, frozen networks included.

  Args:
    params: parameters (arrays or shapes with shardings).
    networks: those that never train.
    stage: which leaves train.
    optim: gives the learning rate and its multipliers.
    origins: where each parameter is from, by its path.
  """
  leaves, is_trained = by_path(params), by_path(split_trainable(params, stage)[0]).keys()
  groups: dict[tuple[str, bool], list[str]] = {}
  for path in leaves:
    groups.setdefault((path.split('/')[0], path in is_trained), []).append(path)
  rows = [('group', 'parameters', 'state', 'rate', 'dtype', 'sharding', 'source')]
  for (name, trained), paths in groups.items():
    own = [leaves[path] for path in paths]
    rates = (f'{optim.lr * optimizer.multiplier(path, optim):g}' for path in paths)
    state = ('trains', _shares(rates, own)) if trained else ('frozen', '-')
    source = _shares([origins[path] for path in paths], own)
    rows.append((name, _count(own), *state, *_kinds(own), source))
  for name, tree in networks.params.items():
    own = jax.tree.leaves(tree)
    rows.append((name, _count(own), 'frozen', '-', *_kinds(own), networks.sources[name]))
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


def sample_text(batch: Batch, caption: str) -> str:
  """One data sample: its caption and the shapes of the whole batch."""
  arrays = {'example': batch.example, **batch.inputs, **batch.encoded}
  shapes = ', '.join(
    f'{name} {list(array.shape)} {np.dtype(array.dtype).name}' for name, array in arrays.items()
  )
  return f'data: {shapes}\n  first caption: {caption!r}'


def _count(leaves: list[Any]) -> str:
  return f'{sum(int(np.prod(leaf.shape)) for leaf in leaves):,}'


def _kinds(leaves: list[Any]) -> tuple[str, str]:
  """Dtypes, and shardings by the share of parameters that has them, largest first."""
  dtypes = '/'.join(sorted({np.dtype(leaf.dtype).name for leaf in leaves}))
  return dtypes, _shares(map(_spec, leaves), leaves, always=True)


def _shares(words: Iterable[str], leaves: Sequence[Any], always: bool = False) -> str:
  """Words that tell of one leaf each, with the share of parameters, largest first."""
  sizes: Counter[str] = Counter()
  for word, leaf in zip(words, leaves, strict=True):
    sizes[word] += int(np.prod(leaf.shape))
  if len(sizes) == 1 and not always:
    return next(iter(sizes))
  total = max(sum(sizes.values()), 1)
  return ', '.join(f'{word} {size / total:.0%}' for word, size in sizes.most_common(SHOWN))


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
