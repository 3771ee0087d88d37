"""Compares a run's losses with those of the shipped reference run, where both train the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vpe_jax.checkpoints import weights
from vpe_jax.config import Config, differences
from vpe_jax.contracts import System
from vpe_jax.training import metrics
from vpe_jax.training.metrics import Record

WINDOW = 20  # number of records that are averaged
TOLERANCE = 0.1  # relative difference of losses that data order and seed explain
ASSETS = epath.Path(__file__).parent.parent / 'assets'
# Config and preset -> the shipped weights that its reference run trained.
REFERENCES = {'t2i-tiny': 'assets:tiny'}
# Fields that determine the losses after a number of steps, and fields in them that don't.
_DETERMINING = (
  'system', 'stages', 'batch_size', 'start', 'start_weights', 'dtype', 'model', 'data', 'optim',
)  # fmt: skip
_IRRELEVANT = ('data.examples', 'data.encode', 'data.workers')
# Below this number of examples, a run sees each so often that it memorizes them.
_LEAST_EXAMPLES = 12_288


def comparison(system: System, workdir: epath.PathLike) -> str | None:
  """Lines that compare each stage of a run with the reference run of its config and preset.

  Losses are compared at the last step of a stage that both runs have. Without verdict remain
  stages after one of another length, and stages longer than the reference's in which the learning
  rate decays: there the reference is nearer to the end of its decay. A shorter stage should be
  better than the reference at the same step.

  Args:
    system: the system that the run trained.
    workdir: the run's folder.

  Returns:
    The lines; or one that names the fields in which the runs differ; None without a reference run.
  """
  name = f'{system.config.name}-{system.config.preset}'
  if name not in REFERENCES:
    return None
  records = metrics.parse((ASSETS / f'{name}.metrics.jsonl').read_text())
  config = weights.config_of(weights.load(REFERENCES[name])[1], name)
  if fields := incomparable(system.config, config):
    return (
      f'{workdir} is not compared with the reference run {name}, which differs in '
      f'{", ".join(fields)}'
    )
  return '\n'.join(compare_stages(system, metrics.read(workdir), records))


def incomparable(config: Config, reference: Mapping[str, Any]) -> list[str]:
  """Names of the fields that make the losses of two configs incomparable."""
  within = lambda field, names: any(field == n or field.startswith(f'{n}.') for n in names)
  fields = [
    field
    for field in differences(config, reference)
    if within(field, _DETERMINING) and field not in _IRRELEVANT
  ]
  return fields + ['data.examples'] * (0 < config.data.examples < _LEAST_EXAMPLES)


def compare_stages(
  system: System, records: Sequence[Record], reference: Sequence[Record]
) -> list[str]:
  """A line for each stage that both runs have, with the losses of both and a verdict."""
  lines, lengths = [], []
  for number, stage in enumerate(system.stages):
    steps = [_stage_steps(run, stage.name) for run in (records, reference)]
    if not (step := min(steps)):
      break
    ours, theirs = (trailing_means(run, stage.name, step) for run in (records, reference))
    losses = {n: (ours[n], theirs[n]) for n in ours if n in theirs and n not in stage.unweighted}
    values = ', '.join(f'{name} {x:.4f} / {y:.4f}' for name, (x, y) in losses.items())
    earlier = [f'{name} {x:,} / {y:,}' for name, (x, y) in lengths if x != y]
    verdict = _verdict(losses)
    if earlier:
      verdict = f'earlier steps differ ({", ".join(earlier)})'
    elif steps[0] > steps[1] and _decays(system.config, number):
      verdict = f'the learning rates decay over {steps[0]:,} / {steps[1]:,} steps'
    lines.append(f'{stage.name}: your loss / reference loss at step {step:,}: {values}: {verdict}')
    lengths.append((stage.name, steps))
  return lines


def _decays(config: Config, stage: int) -> bool:
  """Whether the learning rate at a step depends on the number of steps of the stage."""
  optim = config.optim_of(stage)
  return optim.schedule in ('cosine', 'linear') and optim.decay_steps == config.steps[stage]


def _verdict(losses: Mapping[str, tuple[float, float]]) -> str:
  """The largest excess over the reference, in words."""
  name, excess = max(((n, x / y - 1) for n, (x, y) in losses.items()), key=lambda pair: pair[1])
  if excess <= TOLERANCE:
    return 'as expected'
  return f'{name} is {excess:.0%} above the reference: see curves.png for where they part'


def trailing_means(records: Sequence[Record], stage: str, step: int) -> dict[str, float]:
  """Means of each loss over the last WINDOW records up to a step of a stage.

  The weighted sum is excluded, because schedules of weights depend on the length of the run.
  """
  of_stage = [record for record in records if record['stage'] == stage]
  recent = [record for record in of_stage if record['stage_step'] <= step][-WINDOW:]
  means = {}
  for name in recent[-1]:
    values = [record[name] for record in recent if record.get(name) is not None]
    if name.startswith('loss/') and values:
      means[name.removeprefix('loss/')] = sum(values) / len(values)
  return means


def _stage_steps(records: Sequence[Record], stage: str) -> int:
  """Number of completed steps of a stage."""
  return max((record['stage_step'] for record in records if record['stage'] == stage), default=0)
