"""Plots of numbers by step, rendered with Pillow."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _MARGIN, _COLUMNS = 460, 260, 56, 2
_INK, _PAPER, _GRID, MARK = (30, 30, 30), (255, 255, 255), (226, 226, 226), (120, 120, 120)
_SMOOTHING = 0.05  # window of the trailing mean, as a fraction of a panel's points
_LABEL = 40  # characters of a label in the legend, at most

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]
Marks = tuple[tuple[float, str], ...]  # first step and name of each stage

# In the order of a panel's curves; further curves repeat them.
COLOURS: tuple[Colour, ...] = (
  (25, 90, 170),
  (205, 90, 30),
  (40, 135, 70),
  (125, 70, 160),
  (150, 110, 20),
  (90, 90, 90),
)


@dataclasses.dataclass(frozen=True)
class Curve:
  """One curve of a plot.

  Attributes:
    points: pairs (step, value); may be empty.
    label: text of the legend; '' for none.
    band: triples (step, low, high) of an interval; may be empty.
    smoothed: whether the curve is a trailing mean, above the points in a lighter colour.
  """

  points: Points
  label: str = ''
  band: tuple[tuple[float, float, float], ...] = ()
  smoothed: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
  """One plot.

  Attributes:
    title: name of the number.
    curves: the curves, at least one with points.
    stages: the stages of the run, which are marked if there are several.
  """

  title: str
  curves: tuple[Curve, ...]
  stages: Marks = ()


@dataclasses.dataclass(frozen=True)
class _Axes:
  """Maps steps and values to pixels of a box (left, top, right, bottom)."""

  steps: tuple[float, float]
  values: tuple[float, float]
  box: tuple[int, int, int, int]

  def pixels(self, points: Sequence[tuple[float, float]]) -> Points:
    """Pixels of points; values outside the axes are clipped."""
    left, top, right, bottom = self.box
    return [
      (
        _scale(step, self.steps, left, right),
        min(max(_scale(value, self.values, bottom, top), top), bottom),
      )
      for step, value in points
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


def _draw_panel(panel: Panel) -> Image.Image:
  image = Image.new('RGB', (_WIDTH, _HEIGHT), _PAPER)
  pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
  axes = _axes(panel)
  left, top, right, bottom = axes.box
  for value in ticks(*axes.values):
    y = _scale(value, axes.values, bottom, top)
    pen.line((left, y, right, y), fill=_GRID)
    pen.text((left - 6, y), f'{value:.4g}', fill=_INK, font=font, anchor='rm')
  for step in ticks(*axes.steps):
    x = _scale(step, axes.steps, left, right)
    pen.line((x, top, x, bottom), fill=_GRID)
    label = f'{step:.6g}'
    x = min(x, _WIDTH - 2 - font.getlength(label) / 2)  # The last one must not leave the panel.
    pen.text((x, bottom + 5), label, fill=_INK, font=font, anchor='mt')
  colours = [COLOURS[index % len(COLOURS)] for index in range(len(panel.curves))]
  for curve, colour in zip(panel.curves, colours):
    _draw_band(image, axes, curve, colour)
  pen = ImageDraw.Draw(image)
  _draw_stages(pen, axes, panel.stages)
  for curve, colour in zip(panel.curves, colours):
    _draw_curve(pen, axes, curve, colour, panel.stages)
  pen.rectangle(axes.box, outline=_INK)
  pen.text((left, 8), panel.title, fill=_INK, font=font)
  labels = [(curve.label, colour) for curve, colour in zip(panel.curves, colours) if curve.label]
  # A single label is right of the title; several are listed in the plot.
  place = (right, 8) if len(labels) == 1 else (right - 6, top + 6)
  for index, (label, colour) in enumerate(labels):
    corner = (place[0], place[1] + 16 * index)
    pen.text(corner, _shortened(label), fill=colour, font=font, anchor='ra')
  return image


def _axes(panel: Panel) -> _Axes:
  """Axes of all curves; outliers of smoothed curves are clipped."""
  shown = [
    smooth(curve.points, panel.stages) if curve.smoothed else curve.points for curve in panel.curves
  ]
  steps = [step for points in shown for step, _ in points]
  values = [value for points in shown for _, value in points]
  values += [bound for curve in panel.curves for _, *bounds in curve.band for bound in bounds]
  box = (_MARGIN, 28, _WIDTH - 14, _HEIGHT - 30)
  return _Axes(_bounds(steps), _bounds(values, 0.08), box)


def _draw_band(image: Image.Image, axes: _Axes, curve: Curve, colour: Colour) -> None:
  """Draws an interval as a translucent area, or as a bar if there is a single step."""
  low = axes.pixels([(step, value) for step, value, _ in curve.band])
  high = axes.pixels([(step, value) for step, _, value in curve.band])
  mask = Image.new('L', image.size, 0)
  if len(curve.band) > 1:
    ImageDraw.Draw(mask).polygon([*low, *reversed(high)], fill=45)
  elif curve.band:
    ImageDraw.Draw(mask).line([*low, *high], fill=160, width=3)
  image.paste(Image.new('RGB', image.size, colour), mask=mask)


def _draw_stages(pen: ImageDraw.ImageDraw, axes: _Axes, stages: Marks) -> None:
  """Marks the first step of each stage, and writes its name beside the mark."""
  left, top, right, bottom = axes.box
  for step, name in stages if len(stages) > 1 else ():
    if step > axes.steps[1]:
      continue
    x = _scale(max(step, axes.steps[0]), axes.steps, left, right)
    for y in range(top, bottom, 6):
      pen.line((x, y, x, y + 2), fill=MARK)
    pen.text((x + 4, bottom - 4), name, fill=MARK, font=ImageFont.load_default(12), anchor='ls')


def _draw_curve(
  pen: ImageDraw.ImageDraw, axes: _Axes, curve: Curve, colour: Colour, stages: Marks
) -> None:
  if curve.smoothed:
    light = tuple(level + round(0.63 * (255 - level)) for level in colour)
    pen.line(axes.pixels(curve.points), fill=light)
    pixels = axes.pixels(smooth(curve.points, stages))
    pen.line(pixels, fill=colour, width=2)
    if len(pixels) == 1:
      ((x, y),) = pixels
      pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=colour)
    return
  pixels = axes.pixels(curve.points)
  for x, y in pixels:
    pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
  pen.line(pixels, fill=colour)


def _shortened(label: str) -> str:
  """The label; of a long one, the end."""
  return label if len(label) <= _LABEL else f'...{label[3 - _LABEL :]}'


def _bounds(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
  """Range of the values, extended on both sides by a fraction of itself."""
  low, high = min(values), max(values)
  extent = (high - low) or abs(high) or 1.0
  if low == high:
    return low - extent / 2, high + extent / 2
  return low - margin * extent, high + margin * extent


def _scale(value: float, bounds: tuple[float, float], start: float, end: float) -> float:
  return start + (value - bounds[0]) / (bounds[1] - bounds[0]) * (end - start)
