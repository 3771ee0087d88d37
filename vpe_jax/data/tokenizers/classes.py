"""Class names as tokens: what a class-conditional model reads in the place of captions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vpe_jax.config import CLASSES, nearest
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.storage import read_text


class Classes(bpe.Tokens):
  """One token for each class; a caption is the name of a class, or its number.

  Attributes:
    names: of the classes, in the order of their tokens.
  """

  pad = 0

  def __init__(self, names: Iterable[str]):
    """Takes the names of the classes.

    Raises:
      UserError: there are none, or two are equal.
    """
    self.names = tuple(names)
    self._ids_of = {name: i for i, name in enumerate(self.names)}
    if not self.names or len(self._ids_of) != len(self.names):
      raise UserError(f'classes need different names, at least one: {self.names[:5]}')

  @property
  def vocabulary(self) -> int:
    """Number of classes."""
    return len(self.names)

  def _ids(self, caption: str) -> list[int]:
    name = ' '.join(caption.split())
    if name in self._ids_of:
      return [self._ids_of[name]]
    if name.isdecimal() and int(name) < len(self.names):
      return [int(name)]
    raise UserError(f"no class '{name}'{nearest(name, self.names)}")

  def decode(self, ids: Iterable[int]) -> str:
    """The names of classes."""
    return ', '.join(self.names[int(i)] for i in ids)


def of_names(listed: str) -> Classes:
  """The classes that a config lists after `classes:`.

  Args:
    listed: names with commas between them; or how many there are, whose names are `0`, `1`, ...;
      or a text file with a name a line.

  Raises:
    UserError: the file can't be read, or names are missing or equal.
  """
  if re.fullmatch(r'\d{1,6}', listed):
    return Classes(str(i) for i in range(int(listed)))
  if listed.endswith('.txt'):
    path = Path(listed).expanduser()
    if not path.is_file():
      raise UserError(f'no file {path}: data.tokenizer={CLASSES}FILE needs a name a line in it')
    return Classes(line.strip() for line in read_text(path).splitlines() if line.strip())
  return Classes(name.strip() for name in listed.split(',') if name.strip())
