"""RUN/curves.png: plots of a run's metrics."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

from etils import epath

from vpe_jax import storage
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation.plots import Curve, Panel, Points, render
from vpe_jax.evaluation.report import BOUNDS, TRUE_DRAFTS
from vpe_jax.training import metrics
from vpe_jax.training.metrics import Record

FILE = 'curves.png'
_PREFIXES = ('eval/', 'sample/')  # numbers of heldout and sample_grid


def write(workdir: epath.PathLike, unweighted: Collection[str] = ()) -> None:
  """Writes the plots of a run to its folder; does nothing if there are no records.

  Args:
    workdir: the run's folder.
    unweighted: names of loss terms that are logged only, such as an accuracy.
  """
  panels = make_panels(metrics.read(workdir), unweighted)
  if not panels:
    return
  buffer = io.BytesIO()
  render(panels).save(buffer, format='PNG')
  storage.write_atomic(epath.Path(workdir) / FILE, buffer.getvalue())


def make_panels(records: Sequence[Record], unweighted: Collection[str] = ()) -> list[Panel]:
  """Makes panels of the recorded losses, gradient norm, and numbers of evaluators.

  A held-out loss is in the panel of its training loss, and a number of images from ground-truth
  drafts in that of the same number of images from the model's own drafts. The title of a term in
  `unweighted` doesn't call it a loss.
  """
  names = list(dict.fromkeys(name for record in records for name in record))
  stages: dict[str, float] = {}
  for record in records:
    stages.setdefault(record.get('stage', ''), record['step'])
  marks = tuple((step, stage) for stage, step in stages.items() if stage)
  training = [name for name in names if name.startswith('loss/')] + ['grad_norm']
  panels = [
    Panel(
      name,
      (
        Curve(_points(records, name), smoothed=True),
        _curve(records, f'eval/{name[5:]}', 'held out'),
      ),
    )
    for name in training
  ]
  held_out = {f'eval/{name[5:]}' for name in training}
  known = (*_PREFIXES, *(f'{name}/' for name in evaluators.names()))
  for name in names:
    is_evaluated = name.startswith(known) and not name.endswith(BOUNDS)
    if is_evaluated and name not in held_out and f'/{TRUE_DRAFTS}/' not in name:
      drafts = _curve(records, _of_true_drafts(name), 'ground-truth drafts')
      panels.append(Panel(name, (_curve(records, name), drafts)))
  titles = {f'loss/{name}': name for name in unweighted}
  return [
    Panel(titles.get(panel.title, panel.title), tuple(c for c in panel.curves if c.points), marks)
    for panel in panels
    if panel.curves[0].points
  ]


def _of_true_drafts(name: str) -> str:
  """Name of the same number of images from ground-truth drafts."""
  if name.startswith('sample/own/'):
    return name.replace('/own/', f'/{TRUE_DRAFTS}/')
  start, _, last = name.rpartition('/')
  return f'{start}/{TRUE_DRAFTS}/{last}'


def _curve(records: Sequence[Record], name: str, label: str = '') -> Curve:
  """The curve of an evaluator's number, with its interval."""
  low, high = (dict(_points(records, name + bound)) for bound in BOUNDS)
  band = tuple((step, low[step], high[step]) for step in low if step in high)
  points = _points(records, name)
  return Curve(points, label if points else '', band)


def _points(records: Sequence[Record], name: str) -> Points:
  return [(r['step'], r[name]) for r in records if r.get(name) is not None]
