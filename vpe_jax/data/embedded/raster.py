"""Rasterizes SVG drawings at any resolution, with a memory cache and a disk cache."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import threading
from collections.abc import Callable, Hashable

import numpy as np
import resvg_py
from PIL import Image

from vpe_jax.data.records import Box
from vpe_jax.storage import cache_dir, write_atomic

_EXTENT_SIDE = 288  # resolution at which extents are measured
_MEMORY_BYTES = 192 * 2**20  # bytes of the memory cache of each process


class _ArrayCache:
  """A thread-safe LRU cache of arrays, limited by bytes."""

  def __init__(self, limit: int):
    self._limit = limit
    self._used = 0
    self._items: collections.OrderedDict[Hashable, np.ndarray] = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
    with self._lock:
      if key in self._items:
        self._items.move_to_end(key)
        return self._items[key]
    value = make()
    value.setflags(write=False)
    with self._lock:
      if key not in self._items:
        self._items[key] = value
        self._used += value.nbytes
      while self._used > self._limit and len(self._items) > 1:
        self._used -= self._items.popitem(last=False)[1].nbytes
    return value


_pixels = _ArrayCache(_MEMORY_BYTES)


def raster(svg: str, side: int) -> np.ndarray:
  """Rasterizes the whole square drawing: uint8 [side, side, 4], premultiplied alpha."""
  key = content_key(svg)
  return _pixels.get((key, side), lambda: _decode(_png(svg, key, side)))


def trimmed(svg: str, side: int) -> np.ndarray:
  """The drawing cropped to its ink.

  Returns:
    uint8 [h, w, 4] with max(h, w) == side, premultiplied alpha.
  """
  key = content_key(svg)
  return _pixels.get((key, side, 'trimmed'), lambda: _trim(svg, side))


@functools.lru_cache(maxsize=8192)
def extent(svg: str) -> Box:
  """Bounding box of the ink in the square drawing, as fractions of the side; all of it if empty."""
  alpha = raster(svg, _EXTENT_SIDE)[..., 3] > 0
  rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
  if not len(rows):
    return (0.0, 0.0, 1.0, 1.0)
  edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
  return tuple(float(edge) / _EXTENT_SIDE for edge in edges)


def content_key(svg: str) -> str:
  """Cache key of a drawing: a hash of its content and of the version of the renderer."""
  text = f'{resvg_py.__version__}\n{svg}'
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _trim(svg: str, side: int) -> np.ndarray:
  left, top, right, bottom = extent(svg)
  longer = max(right - left, bottom - top)
  # Downsampled from a raster whose ink is at least twice as large. The side of that raster is a
  # power of two, so that few rasters serve all sizes.
  source_side = 2 ** int(np.ceil(np.log2(2 * side / longer)))
  pixels = raster(svg, source_side)
  image = Image.frombuffer('RGBa', (source_side, source_side), pixels, 'raw', 'RGBa', 0, 1)
  size = [max(1, round(side * span / longer)) for span in (right - left, bottom - top)]
  box = tuple(edge * source_side for edge in (left, top, right, bottom))
  return np.array(image.resize(size, Image.Resampling.BICUBIC, box=box))


def _png(svg: str, key: str, side: int) -> bytes:
  path = cache_dir() / 'rasters' / key[:2] / f'{key}-{side}.png'
  if path.exists():
    return path.read_bytes()
  content = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
  write_atomic(path, content)
  return content


def _decode(png: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(png)) as image:
    return np.array(image.convert('RGBA').convert('RGBa'))
