"""Records: what a truth says of itself."""

from __future__ import annotations

import numpy as np

from vpe_jax.data.embedded.synthetic import Noise
from vpe_jax.data.records import Cluster, Record, Truth, render

_BOX = (0.1, 0.1, 0.4, 0.4)
_TRUTH = Truth(
  (
    Cluster('circle', 'shape', (_BOX, _BOX), colour='red'),
    Cluster('dog', 'emoji', (_BOX,), code='1F415', size='small'),
    Cluster('circle', 'shape', (_BOX,), colour='blue'),
  )
)


def test_objects_are_listed_one_by_one():
  things = _TRUTH.objects
  assert [(t.name, t.kind, t.colour, t.size) for t in things] == [
    ('circle', 'shape', 'red', None),
    ('circle', 'shape', 'red', None),
    ('dog', 'emoji', None, 'small'),
    ('circle', 'shape', 'blue', None),
  ]
  assert all(thing.box == _BOX for thing in things)


def test_counts_add_up_over_clusters():
  assert _TRUTH.counts == {'circle': 3, 'dog': 1}


def test_render_draws_the_picture():
  record = Record('x', 'x', 'x', 'train', Noise(3))
  np.testing.assert_array_equal(render(record, 16), Noise(3).render(16))
