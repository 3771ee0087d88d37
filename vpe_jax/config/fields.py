"""Checks of the fields of config sections, whose errors name the field and the cure."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from vpe_jax.contracts import UserError

# Annotations of the fields that `check_sizes` checks.
_SIZE_TYPES = (
  int, tuple[int, ...], 'int', 'int | None', 'tuple[int, ...]', 'int | tuple[int, ...]',
)  # fmt: skip
_MAX_LAYERS = 1000
MAX_SIZE = 10**8  # a larger size is a typing error, and its program would take hours to build


class OutOfRange(UserError):
  """A field's value is out of range; `build_section` sets the path of the section."""

  def __init__(self, name: str, message: str, path: str):
    super().__init__(f"config key '{path}{name}' {message}")
    self.name, self.message = name, message


def check(section: Any, path: str, name: str, valid: bool, requirement: str) -> None:
  """Raises a UserError unless a field's value is `valid`.

  Args:
    section: a dataclass, during its `__post_init__`.
    path: path of the section, such as `optim.`; '' for a section that may have several paths
      (`build_section` adds it).
    name: name of the field.
    valid: whether its value is in range.
    requirement: completes "it must be ..." in the error.
  """
  if not valid:
    raise OutOfRange(name, f'is {getattr(section, name)!r}: it must be {requirement}', path)


def check_sizes(section: Any, path: str = '', **minimum: int) -> None:
  """Applies `check` to all sizes of a section: fields that hold whole numbers or tuples of them.

  A field that is None, where its type allows that, has no bound.

  `minimum` has lower bounds by field name; the bound of other fields is 1, or their default if that
  is lower.
  """
  for field in dataclasses.fields(section):
    if field.type not in _SIZE_TYPES:
      continue
    default = field.default if isinstance(field.default, int) else 1
    low, value = minimum.get(field.name, min(1, default)), getattr(section, field.name)
    if value is None and 'None' in str(field.type):
      continue
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    check(section, path, field.name, whole, 'a whole number')
    check(section, path, field.name, min(sizes, default=low) >= low, f'at least {low}')
    # Some networks are traced layer by layer, so many layers take long to trace.
    high = _MAX_LAYERS if field.name == 'layers' else MAX_SIZE
    check(section, path, field.name, max(sizes, default=0) <= high, f'at most {high}')


def check_positive(section: Any, path: str, *names: str) -> None:
  """Applies `check` to fields that must be above 0 and finite: one number, or a tuple of them."""
  for name in names:
    valid = all(0 < value < math.inf for value in _values(section, name))
    check(section, path, name, valid, 'above 0 and finite')


def check_nonnegative(section: Any, path: str, *names: str) -> None:
  """As `check_positive`, for fields that may be 0."""
  for name in names:
    valid = all(0 <= value < math.inf for value in _values(section, name))
    check(section, path, name, valid, 'at least 0 and finite')


def _values(section: Any, name: str) -> tuple[Any, ...]:
  value = getattr(section, name)
  return value if isinstance(value, tuple) else (value,)


class Tagged:
  """Annotation of a config field whose section is of one of several kinds.

  The section's field `kind` names the kind; its other fields are those of that kind's dataclass.

  Attributes:
    KINDS: kind -> its frozen dataclass, which has a field `kind`.
  """

  KINDS: ClassVar[Mapping[str, type]]


def did_you_mean(word: str, known: Iterable[str]) -> str:
  """End of an error message: `; did you mean 'x'?` for a close match, else all known words."""
  known = sorted(known)
  if not known:
    return '; there are none here'
  close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
  return f"; did you mean '{close[0]}'?" if close else f'; known: {", ".join(known)}'
