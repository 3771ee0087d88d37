"""Batches of examples, in an order that is a function of (seed, examples seen) alone.

Place p of the stream holds record `index_at(p)`: each epoch is a seeded shuffle of all records,
and epochs follow one another without end. A batch is cut from the stream before any reader
process sees it, so the order knows nothing of processes, threads, hosts, or where a run resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from vpe_jax.config import DataConfig
from vpe_jax.contracts import Examples, UserError
from vpe_jax.data.cache import KINDS, Encoded
from vpe_jax.data.embedded import near_misses
from vpe_jax.data.records import Record, Source, Split, render
from vpe_jax.data.sources import open_source
from vpe_jax.data.tokenizers import bpe
from vpe_jax.data.tokenizers.published import open_tokenizer

_THREADS = 2  # of this process, where no reader processes are asked for
_AHEAD = 4  # batches made ahead of use
_A_CORE, _FEW = 4, 16  # most reader processes, a core, and at least so many on any host

Row = dict[str, np.ndarray]


class Pipeline:
  """The stream of examples of one config, seed and split.

  Attributes:
    source: its records.
    tokenizer: turns captions into tokens.
  """

  def __init__(
    self,
    config: DataConfig,
    seed: int,
    split: Split = 'train',
    encoded: Encoded | None = None,
    opened: tuple[Source, bpe.Tokens] | None = None,
  ):
    """Opens the source; reads no picture yet.

    Args:
      config: what to read and how.
      seed: of the order, and of what the source makes by chance.
      split: `train`, or held-out `combination` or `concept`.
      encoded: codes and latents by source index (a cache, or synthetic ones); with it, examples
        carry these and no image. With `references` those of the picture before, too.
      opened: the config's source and tokenizer, where they are open already.

    Raises:
      UserError: the source can't be opened, or `encoded` is of another number of records.
    """
    opened = opened or (open_source(config, split, seed), open_tokenizer(config.tokenizer))
    self.source: Source = opened[0]
    self.tokenizer: bpe.Tokens = opened[1]
    self._config = config
    self._encoded = encoded
    if encoded is not None and len(encoded) != len(self.source):
      raise UserError(
        f'the cache holds {len(encoded)} records and the source {len(self.source)}; build it again'
      )
    places = grain.MapDataset.range(len(self.source)).seed(seed % 2**32).shuffle().repeat()
    self._places = places.map_with_index(_Numbered())
    self._rows = self._places.map(self._reader())

  def __len__(self) -> int:
    """Number of records: of an epoch."""
    return len(self.source)

  def index_at(self, place: int) -> int:
    """The source index of the record at a place of the stream."""
    return self._places[place][1]

  def record(self, index: int) -> Record:
    """One record of the source, for its caption and truth."""
    return self.source[index]

  def said(self, index: int) -> str:
    """What the picture of a record is drawn from: see `DataConfig.words`."""
    return said_of(self.source[index], self._config.words)

  def examples(self, indices: Sequence[int]) -> Examples:
    """Fixed records of the source as one batch, for previews and for building a cache.

    Args:
      indices: source indices; they also serve as `example`.
    """
    reader = self._reader()
    return _examples(_stack([reader((index, index)) for index in indices]))

  def batches(
    self, start_example: int, batch_size: int, host_index: int = 0, host_count: int = 1
  ) -> Batches:
    """The stream from a place on, without end, in this host's share of each global batch.

    Args:
      start_example: examples that were seen before: the place of the first one.
      batch_size: examples of a global batch. Host h of n gets rows [h B/n, (h + 1) B/n).
      host_index: h.
      host_count: n.

    Returns:
      An iterator of Examples with numpy leaves; close it, or use it in a `with` block.

    Raises:
      UserError: the batch doesn't divide over the hosts, or far more processes are to read than
        there are cores, which would starve this one.
    """
    if batch_size < 1 or batch_size % host_count:
      raise UserError(f'a batch of {batch_size} does not divide over {host_count} hosts')
    cores = os.cpu_count() or 1
    if self._config.workers > (most := max(_FEW, _A_CORE * cores)):
      raise UserError(
        f'data.workers is {self._config.workers}, and this host has {cores} CPU core(s): set it to '
        f'at most {most}'
      )
    rows = self._rows[start_example:].batch(batch_size // host_count, batch_fn=_stack)
    return Batches(rows[host_index::host_count], self._config.workers)

  def _reader(self) -> _Reader:
    config = self._config
    return _Reader(
      self.source,
      self.tokenizer,
      config.image_size,
      config.text_length,
      self._encoded,
      config.near_misses,
      config.words,
      config.references,
    )


class Batches(contextlib.AbstractContextManager):
  """An endless iterator of Examples that owns threads or processes until it is closed."""

  def __init__(self, rows: grain.MapDataset, workers: int):
    if workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's reader processes read absl flags
      stream = rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD))
      stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    else:
      options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
      stream = rows.to_iter_dataset(options)
    self._iterator = iter(stream)

  def __iter__(self) -> Iterator[Examples]:
    return self

  def __next__(self) -> Examples:
    return _examples(next(self._iterator))

  def close(self) -> None:
    """Ends its threads and processes."""
    self._iterator.close()

  def __exit__(self, *_: Any) -> None:
    self.close()


@dataclasses.dataclass(frozen=True)
class _Numbered(grain.transforms.MapWithIndex):
  """(place in the stream, source index)."""

  def map_with_index(self, index: int, element: int) -> tuple[int, int]:
    return index, int(element)


@dataclasses.dataclass(frozen=True)
class _Reader(grain.transforms.Map):
  """Makes one row of a batch; travels to reader processes."""

  source: Source
  tokenizer: bpe.Tokens
  image_size: int
  text_length: int
  encoded: Encoded | None
  near_misses: int
  words: str
  references: bool

  def map(self, element: tuple[int, int]) -> Row:
    return self(element)

  def __call__(self, element: tuple[int, int]) -> Row:
    place, index = element
    record = self.source[index]
    said = said_of(record, self.words)
    ids, lengths = self.tokenizer.encode_batch([said], self.text_length, cut=True)
    row = {'example': np.int32(place), 'text': ids[0], 'text_length': lengths[0]}
    if self.near_misses:
      row |= self._near(record)
    if self.encoded is not None:
      return row | dict(zip(KINDS, self.encoded[index]))
    if self.references:
      row['reference'] = record.reference.draw(self.image_size)
    return row | {'image': render(record, self.image_size)}

  def _near(self, record: Record) -> Row:
    """Wrong captions, with length 0 where the record has too few."""
    near = np.zeros((self.near_misses, self.text_length), np.int32)
    near_length = np.zeros(self.near_misses, np.int32)
    captions = near_misses.near_misses(record, self.near_misses)
    if captions:
      ids, lengths = self.tokenizer.encode_batch(captions, self.text_length, cut=True)
      near[: len(captions)], near_length[: len(captions)] = ids, lengths
    return {'near': near, 'near_length': near_length}


def said_of(record: Record, words: str) -> str:
  """What the picture of a record is drawn from: its caption, or the name of its group."""
  return record.caption if words == 'caption' else record.group


def _stack(rows: Sequence[Row]) -> Row:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _examples(batch: Row) -> Examples:
  # A copy: what comes from reader processes lies in shared memory that must not be held on to.
  return Examples(**{name: np.array(leaf) for name, leaf in batch.items()})
