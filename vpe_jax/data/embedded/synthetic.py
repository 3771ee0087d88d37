"""Random images, captions and encoded entries for tests and benchmarks; needs no files."""

from __future__ import annotations

import dataclasses

import numpy as np

from vpe_jax.config import DataConfig
from vpe_jax.data.records import DEFAULT_COUNT, Record, Split, check_is_train

_WORDS = ('red', 'blue', 'green', 'big', 'small', 'circle', 'square', 'star', 'dog', 'cat')


@dataclasses.dataclass(frozen=True)
class Noise:
  """A coarse random pattern that depends only on the index."""

  index: int

  def render(self, size: int) -> np.ndarray:
    """The pattern as uint8 [size, size, 3]."""
    coarse = np.random.default_rng((0, self.index)).integers(0, 256, (4, 4, 3), np.uint8)
    cell = np.arange(size) * 4 // size
    return coarse[cell][:, cell]


@dataclasses.dataclass(frozen=True)
class Synthetic:
  """Random records as a data source.

  Record i depends only on i; its source image also on `count`. All records have the group '0',
  which every class list accepts as a name or an index.

  Attributes:
    count: number of records.
    references: whether records have a source image, as edits do.
  """

  count: int
  references: bool = False

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self.count:
      raise IndexError(f'synthetic record {index} of {self.count}')
    rng = np.random.default_rng((1, index))
    words = [_WORDS[i] for i in rng.integers(0, len(_WORDS), rng.integers(1, 5))]
    return Record(
      id=f'synthetic/{index}',
      caption=' '.join(words),
      group='0',
      split='train',
      image=Noise(index),
      reference=Noise(self.count + index) if self.references else None,
    )


def open_synthetic(config: DataConfig, split: Split, seed: int) -> Synthetic:
  """Opens the source `synthetic`; see vpe_jax.data.sources.Opener.

  Raises:
    UserError: the split is held out.
  """
  del seed
  check_is_train(config.source, split)
  return Synthetic(config.examples or DEFAULT_COUNT, config.source_images)


@dataclasses.dataclass(frozen=True)
class SyntheticEncoded:
  """Replaces the cache of encoded entries: random entries by source index.

  Attributes:
    count: number of records.
    entries: (name, shape, codebook size) of each array of one record; codebook size 0 means real
      values.
  """

  count: int
  entries: tuple[tuple[str, tuple[int, ...], int], ...]

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """The entries of one record; see vpe_jax.data.cache.Encoded."""
    rng = np.random.default_rng((2, index))
    return {
      name: rng.integers(0, codebook_size, shape, np.int32)
      if codebook_size
      else rng.standard_normal(shape, np.float32)
      for name, shape, codebook_size in self.entries
    }
