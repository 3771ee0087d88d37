"""RUN/curves.png: plots of a run's metrics, rendered with Pillow."""

from __future__ import annotations

import bisect
import dataclasses
import io
import itertools
import math
from collections.abc import Collection, Sequence

from etils import epath
from PIL import Image, ImageDraw, ImageFont

from vpe_jax import storage
from vpe_jax.training import metrics
from vpe_jax.training.metrics import Record

FILE = 'curves.png'
_WIDTH, _HEIGHT, _MARGIN, _COLUMNS = 460, 260, 56, 2
_INK, _PAPER, _GRID, _MARK = (30, 30, 30), (255, 255, 255), (226, 226, 226), (120, 120, 120)
_RAW, _SMOOTH, _HELD_OUT = (170, 200, 235), (25, 90, 170), (205, 90, 30)
_SMOOTHING = 0.05  # window of the trailing mean, as a fraction of a panel's points

Points = list[tuple[float, float]]
Marks = tuple[tuple[float, str], ...]


@dataclasses.dataclass(frozen=True)
class Panel:
  """One plot.

  Attributes:
    title: name of the metric.
    training: the training curve.
    held_out: the held-out curve, or the curve of ground-truth drafts; may be empty.
    stages: first step and name of each stage.
  """

  title: str
  training: Points
  held_out: Points
  stages: Marks = ()


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
  """Makes panels of the recorded losses, gradient norm, held-out losses and sample metrics.

  The title of a term in `unweighted` doesn't call it a loss.
  """
  names = list(dict.fromkeys(name for record in records for name in record))
  stages: dict[str, float] = {}
  for record in records:
    stages.setdefault(record.get('stage', ''), record['step'])
  marks = tuple((step, stage) for stage, step in stages.items() if stage)
  training = [name for name in names if name.startswith('loss/')] + ['grad_norm']
  panels = [Panel(n, _points(records, n), _points(records, f'eval/{n[5:]}')) for n in training]
  eval_only = [n for n in names if n.startswith('eval/') and f'loss/{n[5:]}' not in names]
  panels += [Panel(n, _points(records, n), []) for n in eval_only]
  for name in names:
    if name.startswith('sample/own/'):
      truth = name.replace('/own/', '/true_drafts/')
      panels.append(Panel(name, _points(records, name), _points(records, truth)))
  titles = {f'loss/{name}': name for name in unweighted}
  return [
    dataclasses.replace(panel, title=titles.get(panel.title, panel.title), stages=marks)
    for panel in panels
    if panel.training
  ]


def render(panels: Sequence[Panel]) -> Image.Image:
  """Renders all panels on one sheet with two columns."""
  rows = math.ceil(len(panels) / _COLUMNS)
  sheet = Image.new('RGB', (_COLUMNS * _WIDTH, rows * _HEIGHT), _PAPER)
  for index, panel in enumerate(panels):
    left, top = index % _COLUMNS * _WIDTH, index // _COLUMNS * _HEIGHT
    sheet.paste(_draw_panel(panel), (left, top))
  return sheet


def smooth(points: Points, stages: Marks = ()) -> Points:
  """Trailing mean of the values over a fixed fraction of the points; begins anew in each stage."""
  width = max(1, round(len(points) * _SMOOTHING))
  starts = [step for step, _ in stages]
  parts = itertools.groupby(points, lambda point: bisect.bisect(starts, point[0]))
  return [point for _, part in parts for point in _trailing_mean(list(part), width)]


def _trailing_mean(points: Points, width: int) -> Points:
  values = [value for _, value in points]
  result = []
  total = 0.0
  for index, (step, value) in enumerate(points):
    total += value - (values[index - width] if index >= width else 0.0)
    result.append((step, total / min(index + 1, width)))
  return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """About `count` round numbers between two bounds."""
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  spacing = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  first = math.ceil(low / spacing)
  return [n * spacing for n in range(first, math.floor(high / spacing) + 1)]


def _points(records: Sequence[Record], name: str) -> Points:
  return [(r['step'], r[name]) for r in records if r.get(name) is not None]


def _draw_panel(panel: Panel) -> Image.Image:
  image = Image.new('RGB', (_WIDTH, _HEIGHT), _PAPER)
  pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
  steps = [step for step, _ in panel.training + panel.held_out]
  curve = smooth(panel.training, panel.stages)
  # The smoothed and held-out curves set the range; outliers of single steps are clipped.
  values = [value for _, value in curve + panel.held_out]
  x_range, y_range = _bounds(steps), _bounds(values, 0.08)
  box = (_MARGIN, 28, _WIDTH - 14, _HEIGHT - 30)
  for value in ticks(*y_range):
    y = _scale(value, y_range, box[3], box[1])
    pen.line((box[0], y, box[2], y), fill=_GRID)
    pen.text((box[0] - 6, y), f'{value:.4g}', fill=_INK, font=font, anchor='rm')
  for value in ticks(*x_range):
    x = _scale(value, x_range, box[0], box[2])
    pen.line((x, box[1], x, box[3]), fill=_GRID)
    label = f'{value:.6g}'
    x = min(x, _WIDTH - 2 - font.getlength(label) / 2)  # The last one must not leave the panel.
    pen.text((x, box[3] + 5), label, fill=_INK, font=font, anchor='mt')

  def to_pixels(points: Points) -> Points:
    return [
      (
        _scale(step, x_range, box[0], box[2]),
        min(max(_scale(value, y_range, box[3], box[1]), box[1]), box[3]),
      )
      for step, value in points
    ]

  _draw_stages(pen, panel.stages, x_range, box)
  pen.line(to_pixels(panel.training), fill=_RAW)
  pen.line(to_pixels(curve), fill=_SMOOTH, width=2)
  if len(curve) == 1:
    ((x, y),) = to_pixels(curve)
    pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=_SMOOTH)
  for x, y in to_pixels(panel.held_out):
    pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_HELD_OUT)
  pen.line(to_pixels(panel.held_out), fill=_HELD_OUT)
  pen.rectangle(box, outline=_INK)
  pen.text((box[0], 8), panel.title, fill=_INK, font=font)
  if panel.held_out:
    is_sample = panel.title.startswith('sample/')
    legend = 'ground-truth drafts' if is_sample else 'held out'
    pen.text((box[2], 8), legend, fill=_HELD_OUT, font=font, anchor='ra')
  return image


def _draw_stages(
  pen: ImageDraw.ImageDraw,
  stages: Marks,
  x_range: tuple[float, float],
  box: tuple[int, int, int, int],
) -> None:
  """Marks the first step of each stage, and writes its name beside the mark."""
  for step, name in stages if len(stages) > 1 else ():
    if step > x_range[1]:
      continue
    x = _scale(max(step, x_range[0]), x_range, box[0], box[2])
    for y in range(box[1], box[3], 6):
      pen.line((x, y, x, y + 2), fill=_MARK)
    pen.text((x + 4, box[3] - 4), name, fill=_MARK, font=ImageFont.load_default(12), anchor='ls')


def _bounds(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
  """Range of the values, extended on both sides by a fraction of itself."""
  low, high = min(values), max(values)
  extent = (high - low) or abs(high) or 1.0
  if low == high:
    return low - extent / 2, high + extent / 2
  return low - margin * extent, high + margin * extent


def _scale(value: float, bounds: tuple[float, float], start: float, end: float) -> float:
  return start + (value - bounds[0]) / (bounds[1] - bounds[0]) * (end - start)
