"""Plain shapes: distinct forms and colours."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vpe_jax.data.embedded import raster, shapes


@pytest.mark.parametrize('shape', shapes.SHAPES)
def test_shapes_have_their_colour(shape):
  pixels = raster.raster(shapes.svg(shape, 'blue'), 96)
  solid = pixels[pixels[..., 3] == 255][:, :3]
  assert len(solid) > 96 * 96 * 0.15
  assert (solid == shapes.COLOURS['blue']).all()


def test_shapes_differ():
  masks = {s: raster.raster(shapes.svg(s, 'black'), 64)[..., 3] > 127 for s in shapes.SHAPES}
  for first, second in itertools.combinations(masks.values(), 2):
    assert (first != second).mean() > 0.05


def test_colours_and_backgrounds_are_distinct():
  backgrounds = {'white': shapes.WHITE} | shapes.TINTS
  for (a, x), (b, y) in itertools.combinations((shapes.COLOURS | backgrounds).items(), 2):
    both_backgrounds = a in backgrounds and b in backgrounds
    if (a, b) not in shapes.CLASHES and not both_backgrounds:
      assert np.linalg.norm(np.subtract(x, y)) > 60, (a, b)
