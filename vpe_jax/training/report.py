"""The start-up report of a run: devices, stages, parameters, memory and data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath

from vpe_jax import storage
from vpe_jax.config import Config, OptimConfig
from vpe_jax.contracts import Batch, Params, Stage
from vpe_jax.data.formats.entries import abbreviated
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import memory, optimizer
from vpe_jax.training.programs import StagePrograms
from vpe_jax.training.state import split_trainable

PARAMETERS_FILE = 'parameters.txt'
MAX_LISTED = 3  # shardings or sources listed in a table row


def devices_text(mesh: jax.sharding.Mesh) -> str:
  """Line with devices, processes and mesh."""
  axes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return (
    f'devices: {jax.device_count()} x {jax.devices()[0].device_kind} '
    f'in {jax.process_count()} process(es); mesh: {axes}'
  )


def stage_text(stage: Stage, config: Config, index: int) -> str:
  """Lines on a stage: its position, steps, learning rate, EMA decay, losses and their weights."""
  optim, count = config.optim_of(index), len(config.stages)
  position = f' ({index + 1} of {count})' if count > 1 else ''
  ema = f'EMA decay {optim.ema:g}' if stage.ema else 'no EMA'
  weights = {n: weight for n, weight in stage.losses.items() if n not in stage.unweighted}
  losses = ', '.join(
    f'{name} x {weight:g}' if isinstance(weight, (int, float)) else f'{name} x {weight}'
    for name, weight in weights.items()
  )
  others = ''.join(
    f'; {label}: {", ".join(names)}'
    for label, names in (('logged only', stage.unweighted), ('held-out only', stage.monitored))
    if names
  )
  return (
    f'stage {stage.name}{position}: {config.steps[index]:,} steps of {config.batch_size[index]:,} '
    f'examples, {optim.name} with learning rate {_rate_text(optim)}, {ema}\n'
    f'  losses: {losses}{others}'
  )


def _rate_text(optim: OptimConfig) -> str:
  """The learning rate of a stage: its peak, warm-up and decay."""
  warmup = f'{optim.lr:g} after {optim.warmup:,} warm-up steps'
  if optim.schedule == 'constant':
    return warmup
  length = '' if optim.schedule == 'rsqrt' else f' at step {optim.decay_steps:,}'
  return f'{warmup}, then {optim.schedule} to {optim.lr_end:g}{length}'


def origins_after(stages: Sequence[Stage], initial: Mapping[str, str]) -> dict[str, str]:
  """Origin of each parameter after some stages: the last stage that trained it, or `initial`.

  Args:
    stages: the stages that have run.
    initial: path -> origin before these stages.
  """
  origins = dict(initial)
  for stage in stages:
    origins |= {path: f'stage {stage.name}' for path in origins if stage.trains(path)}
  return origins


@dataclasses.dataclass(frozen=True)
class Networks:
  """Frozen networks and the sources of their weights, by name."""

  params: Mapping[str, Params]
  sources: Mapping[str, str]


def parameters_text(
  params: Params, networks: Networks, stage: Stage, optim: OptimConfig, origins: Mapping[str, str]
) -> str:
  """Table of the parameter groups of a stage, including frozen networks.

  Args:
    params: parameters (arrays or shapes with shardings).
    networks: networks that never train.
    stage: selects the trainable parameters.
    optim: optimizer settings, with the learning rate and its multipliers.
    origins: path -> origin of each parameter.
  """
  leaves = leaves_by_path(params)
  trainable = leaves_by_path(split_trainable(params, stage)[0]).keys()
  groups: dict[tuple[str, bool], list[str]] = {}
  for path in leaves:
    groups.setdefault((path.split('/')[0], path in trainable), []).append(path)
  rows = [('group', 'parameters', 'state', 'rate', 'dtype', 'sharding', 'source')]
  for (name, is_trainable), paths in groups.items():
    group = [leaves[path] for path in paths]
    rates = (f'{optim.lr * optimizer.multiplier(path, optim):g}' for path in paths)
    state = ('trains', _fractions(rates, group)) if is_trainable else ('frozen', '-')
    source = _fractions([origins[path] for path in paths], group)
    rows.append((name, _count(group), *state, *_dtypes_and_shardings(group), source))
  for name, tree in networks.params.items():
    group = jax.tree.leaves(tree)
    source = networks.sources[name]
    rows.append((name, _count(group), 'frozen', '-', *_dtypes_and_shardings(group), source))
  return _table(rows)


def write_parameters(workdir: epath.Path, params: Params) -> None:
  """Writes RUN/parameters.txt: name, shape, dtype, size and sharding of every parameter.

  Raises:
    UserError: the file can't be written.
  """
  text = parameter_overview.get_parameter_overview(params, include_stats='sharding')
  with storage.writing(workdir / PARAMETERS_FILE):
    storage.write_atomic(workdir / PARAMETERS_FILE, f'{text}\n'.encode())


def memory_text(programs: StagePrograms) -> str:
  """Line with the memory of a stage's training step and evaluators."""
  usage, step = programs.usage(), memory.usage(programs.step.compiled)
  if usage is None or step is None:
    return 'memory: this backend does not report it'
  name = programs.step.name
  others = ''.join(
    f'; {memory.size_text(size)} in {other}' for other, size in usage.items() if other != name
  )
  return (
    f'memory per device: {memory.size_text(usage[name])} in the {name} '
    f'(state, frozen networks and batch {memory.size_text(step.arguments)}, '
    f'temporaries {memory.size_text(step.temporary)}){others}'
  )


def sample_text(batch: Batch, caption: str) -> str:
  """Lines with the shapes of a batch and its first caption."""
  arrays = {'example': batch.example, **batch.inputs, **batch.encoded}
  shapes = ', '.join(
    f'{name} {list(array.shape)} {np.dtype(array.dtype).name}' for name, array in arrays.items()
  )
  return f'data: {shapes}\n  first caption: {abbreviated(caption)!r}'


def _count(leaves: list[Any]) -> str:
  return f'{sum(int(np.prod(leaf.shape)) for leaf in leaves):,}'


def _dtypes_and_shardings(leaves: list[Any]) -> tuple[str, str]:
  """Dtypes, and shardings with their fractions of the parameters."""
  dtypes = '/'.join(sorted({np.dtype(leaf.dtype).name for leaf in leaves}))
  return dtypes, _fractions(map(_spec, leaves), leaves, always=True)


def _fractions(labels: Iterable[str], leaves: Sequence[Any], always: bool = False) -> str:
  """Lists labels with their fractions of the parameters, largest first.

  Args:
    labels: one for each leaf.
    leaves: the parameters.
    always: whether to give the fraction if there is only one label.
  """
  sizes: Counter[str] = Counter()
  for label, leaf in zip(labels, leaves, strict=True):
    sizes[label] += int(np.prod(leaf.shape))
  if len(sizes) == 1 and not always:
    return next(iter(sizes))
  total = max(sum(sizes.values()), 1)
  return ', '.join(f'{label} {size / total:.0%}' for label, size in sizes.most_common(MAX_LISTED))


def _spec(leaf: Any) -> str:
  spec = getattr(getattr(leaf, 'sharding', None), 'spec', ())
  axes = [str(axis) if axis else '-' for axis in spec]
  return f'({" ".join(axes)})' if any(axis != '-' for axis in axes) else 'replicated'


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
