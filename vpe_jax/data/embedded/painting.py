"""Renders scenes and emoji at any size."""

from __future__ import annotations

import dataclasses

import numpy as np

from vpe_jax.data.embedded import drawings, raster, shapes
from vpe_jax.data.records import Cluster, Truth


@dataclasses.dataclass(frozen=True)
class Painting:
  """The image of a scene: each object, cropped to its ink, in its box on the background."""

  truth: Truth

  def render(self, size: int) -> np.ndarray:
    """The scene as uint8 [size, size, 3]."""
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:] = shapes.background_colour(self.truth.background)
    for cluster in self.truth.clusters:
      for left, top, right, bottom in cluster.boxes:
        side = max(1, round(max(right - left, bottom - top) * size))
        pixels = raster.trimmed(svg_of(cluster), side)
        _paste(canvas, pixels, (left + right) / 2 * size, (top + bottom) / 2 * size)
    return canvas


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A whole OpenMoji drawing on white, including its margins."""

  code: str

  def render(self, size: int) -> np.ndarray:
    """The drawing as uint8 [size, size, 3]."""
    canvas = np.full((size, size, 3), 255, np.uint8)
    _paste(canvas, raster.raster(drawings.svg(self.code), size), size / 2, size / 2)
    return canvas


def svg_of(cluster: Cluster) -> str:
  """The SVG text of one object of a cluster."""
  if cluster.kind == 'shape':
    return shapes.svg(cluster.name, cluster.colour)
  return drawings.svg(cluster.code)


def _paste(canvas: np.ndarray, pixels: np.ndarray, x: float, y: float) -> None:
  """Composites premultiplied `pixels` [h, w, 4] onto the canvas, centred at (x, y)."""
  height, width = pixels.shape[:2]
  top = min(max(round(y - height / 2), 0), canvas.shape[0] - height)
  left = min(max(round(x - width / 2), 0), canvas.shape[1] - width)
  area = canvas[top : top + height, left : left + width]
  transparency = 255 - pixels[..., 3:].astype(np.uint16)
  # After resampling, a premultiplied colour may slightly exceed its alpha.
  area[:] = np.minimum(pixels[..., :3] + (area * transparency + 127) // 255, 255)
