"""Fixtures of toy systems."""

from tests.toy_systems import line_system  # noqa: F401
