"""A held-out part of the user's data: `data.held_out`.

A hash of the image decides whether a record is held out. Copies of an image are in the same part,
and a share stays the same when images are added, renamed or moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from vpe_jax.contracts import UserError
from vpe_jax.data.records import HashedSource, Record, Split, StoredSource
from vpe_jax.storage import stable_hash

_HASHES = 2.0**63  # number of possible hashes


@dataclasses.dataclass(frozen=True)
class Part:
  """Some records of a source.

  Attributes:
    source: all records.
    indices: int64 [N], indices of the records of this part.
    split: name of the part.
  """

  source: StoredSource
  indices: np.ndarray = dataclasses.field(repr=False, compare=False)
  split: Split

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    return dataclasses.replace(self.source[int(self.indices[index])], split=self.split)

  def stamps(self) -> Iterator[str]:
    """Stamps of the source, and the indices; see vpe_jax.data.records.StoredSource."""
    yield from self.source.stamps()
    yield f'part {stable_hash(self.indices.tobytes().hex())}'

  def digests(self) -> Mapping[str, str]:
    """Digests of the whole source; see vpe_jax.data.records.StoredSource."""
    return self.source.digests()


def part_of(source: HashedSource, held_out: float, split: Split, name: str) -> StoredSource:
  """The training records of a source, or its held-out ones.

  Args:
    source: all records.
    held_out: see data.held_out; 0 for a source without a held-out part.
    split: `train`, or any other name for the held-out part.
    name: name of the source in the error.

  Raises:
    UserError: no record, or every record, would be held out.
  """
  if not held_out:
    return source
  is_held_out = _selected(source.hashes(), held_out)
  count = int(is_held_out.sum())
  if not 0 < count < len(source):
    raise UserError(
      f'data.held_out={held_out:g} holds out {count:,} of the {len(source):,} records of {name}: '
      f'{"lower" if count else "raise"} it, or set it to 0'
    )
  indices = np.flatnonzero(is_held_out != (split == 'train'))
  return Part(source, indices, split)


def _selected(contents: np.ndarray, held_out: float) -> np.ndarray:
  """Whether each record is held out, bool [N], by the hashes of the contents uint64 [N]."""
  if held_out < 1:
    return contents < np.uint64(held_out * _HASHES)
  count = min(int(held_out), len(contents))
  # Copies of the last image are held out too.
  return contents <= np.partition(contents, count - 1)[count - 1]
