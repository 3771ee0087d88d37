"""Fixtures of toy systems."""

from tests.toy_systems import (  # noqa: F401
  drawing_system,
  frozen,
  line_system,
)
