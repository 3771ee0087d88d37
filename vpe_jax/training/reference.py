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
  """A line with `your loss / reference loss`; None where no reference run is shipped."""
  path = ASSETS / f'{config.name}-{config.preset}.metrics.jsonl'
  if not path.exists():
    return None
  ours, theirs = metrics.read(workdir), metrics.parse(path.read_text())
  step = min(ours[-1]['step'], theirs[-1]['step'])
  mine, reference = trailing_means(ours, step), trailing_means(theirs, step)
  names = [name for name in mine if name in reference]
  parts = [f'{name} {mine[name]:.4f} / {reference[name]:.4f}' for name in names]
  return f'your loss / reference loss at step {step}: {", ".join(parts)}'


def trailing_means(records: Sequence[Record], step: int) -> dict[str, float]:
  """Means of all losses over the last records up to a step, within that step's stage."""
  upto = [record for record in records if record['step'] <= step]
  recent = [record for record in upto[-WINDOW:] if record['stage'] == upto[-1]['stage']]
  means = {}
  for name in recent[-1]:
    values = [record[name] for record in recent if record.get(name) is not None]
    if (name == 'loss' or name.startswith('loss/')) and values:
      means[name.removeprefix('loss/') if name != 'loss' else name] = sum(values) / len(values)
  return means
