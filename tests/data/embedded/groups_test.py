"""Groups of emoji."""

from __future__ import annotations

import pytest

from vpe_jax.data.embedded.groups import group_of


@pytest.mark.parametrize(
  'code, group',
  [
    ('1F600', 'smileys'),
    ('1F9D1-200D-1F33E', 'people'),
    ('1F415', 'animals'),
    ('1F355', 'food'),
    ('1F697', 'travel'),
    ('26BD', 'activities'),
    ('1F511', 'objects'),
    ('2648', 'symbols'),
    ('1F1EB-1F1F7', 'flags'),
    ('23', 'symbols'),
  ],
)
def test_group(code, group):
  assert group_of(code) == group
