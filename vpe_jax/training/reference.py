"""Compares a run's losses with those of the shipped reference run."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from vpe_jax.config import Config
from vpe_jax.training import metrics
from vpe_jax.training.metrics import Record

WINDOW = 20  # number of records that are averaged
ASSETS = epath.Path(__file__).parent.parent / 'assets'


def comparison(config: Config, workdir: epath.PathLike) -> str | None:
  """A line with `your loss / reference loss`; None if no shipped run has the stage."""
  path = ASSETS / f'{config.name}-{config.preset}.metrics.jsonl'
  if not path.exists():
    return None
  run_records, reference_records = metrics.read(workdir), metrics.parse(path.read_text())
  both = (run_records, reference_records)
  stage = run_records[-1]['stage']
  step = min(_stage_steps(records, stage) for records in both)
  if not step:
    return None
  losses, reference = (trailing_means(records, stage, step) for records in both)
  names = [name for name in losses if name in reference]
  parts = [f'{name} {losses[name]:.4f} / {reference[name]:.4f}' for name in names]
  return f'your loss / reference loss after {step} steps of {stage}: {", ".join(parts)}'


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
