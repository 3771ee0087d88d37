"""Class names as tokens, for class-conditional models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vpe_jax.config import CLASSES, did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.storage import read_text


class Classes(bpe.Tokens):
  """One token for each class; a caption is the name or the index of a class.

  Attributes:
    names: class names, in token order.
  """

  pad = 0

  def __init__(self, names: Iterable[str]):
    """Checks and stores the class names.

    Raises:
      UserError: there are no names, or two are equal.
    """
    self.names = tuple(names)
    self._ids_of = {name: i for i, name in enumerate(self.names)}
    if not self.names or len(self._ids_of) != len(self.names):
      raise UserError(
        f'class names must be unique, and there must be at least one: {self.names[:5]}'
      )

  @property
  def vocabulary(self) -> int:
    """Number of classes."""
    return len(self.names)

  def _ids(self, caption: str) -> list[int]:
    name = ' '.join(caption.split())
    if name in self._ids_of:
      return [self._ids_of[name]]
    # Python refuses to parse numbers of thousands of digits.
    if re.fullmatch(r'\d{1,9}', name) and int(name) < len(self.names):
      return [int(name)]
    raise UserError(f"no class '{name:.80}'{did_you_mean(name, self.names)}")

  def decode(self, ids: Iterable[int]) -> str:
    """The class names of tokens."""
    return ', '.join(self.names[int(i)] for i in ids)


def of_names(listed: str) -> Classes:
  """The classes of `data.tokenizer=classes:...`.

  Args:
    listed: comma-separated names; or the number of classes, which are named `0`, `1`, ...; or the
      path of a text file (.txt) with one name per line.

  Raises:
    UserError: the file can't be read, or names are missing or equal.
  """
  if re.fullmatch(r'\d{1,6}', listed):
    return Classes(str(i) for i in range(int(listed)))
  if listed.endswith('.txt'):
    path = Path(listed).expanduser()
    if not path.is_file():
      raise UserError(f'no file {path}: data.tokenizer={CLASSES}FILE needs one name per line')
    return Classes(line.strip() for line in read_text(path).splitlines() if line.strip())
  return Classes(name.strip() for name in listed.split(',') if name.strip())
