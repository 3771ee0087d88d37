"""Rasterization: resolution, cropping, caches."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.data.embedded import raster
from vpe_jax.storage import cache_dir

_SVG = (
  '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
  '<rect x="18" y="27" width="36" height="18" fill="#ff0000"/></svg>'
)


@pytest.mark.parametrize('side', [16, 72, 300])
def test_raster_at_any_resolution(side):
  pixels = raster.raster(_SVG, side)
  assert pixels.shape == (side, side, 4) and pixels.dtype == np.uint8
  assert pixels[side // 2, side // 2].tolist() == [255, 0, 0, 255]
  assert pixels[0, 0].tolist() == [0, 0, 0, 0]


def test_extent_is_the_bounding_box_of_the_ink():
  np.testing.assert_allclose(raster.extent(_SVG), (0.25, 0.375, 0.75, 0.625), atol=0.005)


@pytest.mark.parametrize('side', [10, 33, 64])
def test_trimmed_has_the_requested_longer_side(side):
  pixels = raster.trimmed(_SVG, side)
  assert pixels.shape == (round(side / 2), side, 4)
  assert pixels[..., 3].min() > 200  # edges may be blended a little
  assert (pixels[..., 1:3] == 0).all()


def test_raster_on_disk_is_reused(monkeypatch):
  svg = _SVG.replace('ff0000', '00ff00')
  before = raster.raster(svg, 48)
  files = list((cache_dir() / 'rasters').rglob(f'{raster.content_key(svg)}-48.png'))
  assert len(files) == 1
  monkeypatch.setattr(raster, '_pixels', raster._ArrayCache(2**20))
  monkeypatch.setattr(raster.resvg_py, 'svg_to_bytes', None)  # calling it would fail
  np.testing.assert_array_equal(raster.raster(svg, 48), before)
  assert raster.content_key(svg) != raster.content_key(svg + ' ')


def test_the_memory_cache_drops_the_least_recently_used():
  memory = raster._ArrayCache(limit=250)
  computed = []

  def make(name):
    return lambda: computed.append(name) or np.zeros(100, np.uint8)

  for name in ('a', 'b', 'a', 'c', 'a', 'b'):
    memory.get(name, make(name))
  assert computed == ['a', 'b', 'c', 'b']
