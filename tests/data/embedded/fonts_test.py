"""Fonts: measured ink, and missing packages."""

from __future__ import annotations

import pytest

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import fonts


def test_ink_is_relative_to_the_baseline():
  for name in fonts.FONTS:
    _, top, _, bottom = fonts.ink(name, 'x')
    assert -0.7 < top < -0.3 and abs(bottom) < 0.05
    assert fonts.ink(name, 'p')[3] > 0.1 and fonts.ink(name, 'l')[1] < top - 0.1


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(fonts._FILES, 'serif', ('font_nowhere', 'Serif.ttf'))
  with pytest.raises(UserError, match='serif.*font-nowhere'):
    fonts.letters('serif', 'x', 7)
