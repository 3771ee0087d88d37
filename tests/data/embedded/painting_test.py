"""Rendering of scenes and emoji at any size."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.data.embedded import shapes
from vpe_jax.data.embedded.painting import Drawing, Painting
from vpe_jax.data.records import Cluster, Truth

_LEFT, _RIGHT = (0.05, 0.3, 0.45, 0.7), (0.55, 0.3, 0.95, 0.7)


@pytest.mark.parametrize('size', [48, 64, 256])
def test_objects_fill_their_boxes(size):
  truth = Truth(
    (
      Cluster('square', 'shape', (_LEFT,), colour='red'),
      Cluster('square', 'shape', (_RIGHT,), colour='blue'),
    ),
    background='light gray',
  )
  image = Painting(truth).render(size)
  assert image.shape == (size, size, 3) and image.dtype == np.uint8
  assert tuple(image[0, 0]) == shapes.TINTS['light gray']
  for (left, top, right, bottom), colour in ((_LEFT, 'red'), (_RIGHT, 'blue')):
    rows, columns = np.nonzero(np.abs(image.astype(int) - shapes.COLOURS[colour]).max(-1) < 60)
    edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / size
    np.testing.assert_allclose(edges, (left, top, right, bottom), atol=1.6 / size)


def test_compositing_does_not_overflow():
  """Small renderings equal averaged large ones; uint8 overflow would show as outliers."""
  truth = Truth((Cluster('bear', 'emoji', ((0.1, 0.1, 0.9, 0.9),), code='1F43B'),))
  small, large = Painting(truth).render(40), Painting(truth).render(640)
  reference = large.reshape(40, 16, 40, 16, 3).mean((1, 3))
  assert np.abs(reference - small).mean() < 8
  assert np.abs(reference - small).max() < 140


def test_emoji_are_rendered_on_white():
  image = Drawing('1F415').render(64)
  assert (image[0] == 255).all() and (image < 128).any()
