"""Your loss against the shipped run's: is this run normal?"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from vpe_jax.config import Config
from vpe_jax.training import metrics
from vpe_jax.training.metrics import Record

WINDOW = 20  # records averaged at the step that is compared
ASSETS = epath.Path(__file__).parent.parent / 'assets'


def comparison(config: Config, workdir: epath.PathLike) -> str | None:
  """A line with `your loss / reference loss`; None where no shipped run has the stage."""
  path = ASSETS / f'{config.name}-{config.preset}.metrics.jsonl'
  if not path.exists():
    return None
  ours, theirs = metrics.read(workdir), metrics.parse(path.read_text())
  stage = ours[-1]['stage']
  lengths = [_stage_steps(records, stage) for records in (ours, theirs)]
  step = min(lengths)
  if not step:
    return None
  mine, reference = (trailing_means(records, stage, step) for records in (ours, theirs))
  names = [name for name in mine if name in reference]
  parts = [f'{name} {mine[name]:.4f} / {reference[name]:.4f}' for name in names]
  return f'your loss / reference loss after {step} steps of {stage}: {", ".join(parts)}'


def trailing_means(records: Sequence[Record], stage: str, step: int) -> dict[str, float]:
  """Means of each loss over the last records up to a step of a stage.

  Their weighted sum is left out: a schedule of weights depends on how long a run is.
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
  """Steps that a run has done of a stage."""
  return max((record['stage_step'] for record in records if record['stage'] == stage), default=0)
