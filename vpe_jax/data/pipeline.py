"""Batches of examples, in an order that depends only on the seed.

Position p of the endless stream holds record `index_at(p)`. Each epoch is a seeded shuffle of all
records. The stream is cut into batches before reader processes divide the work, so the order does
not depend on processes, threads, hosts, or the step at which a run resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from vpe_jax.config import DataConfig
from vpe_jax.contracts import Batch, Preprocess, System, UserError
from vpe_jax.data.cache import Encoded
from vpe_jax.data.records import BadRecord, NotEncoded, Record, Source, Split
from vpe_jax.data.sources import open_source
from vpe_jax.storage import stable_hash

THREADS = 2  # reader threads if there are no reader processes
PREFETCHED = 4  # batches
MAX_WORKERS_PER_CORE, MIN_WORKER_LIMIT = 4, 16

SKIPPED = 'a record is skipped: %s'  # warning

Arrays = dict[str, np.ndarray]
EXAMPLE = 'example'  # name of the array that holds the stream position of each example
_REPLACED = 'replaced'  # array with the source index of a record that could not be read, or -1
_REPLACEMENTS = 16  # records that may replace one; if none can be read, the data are gone
_CAPTION = 1  # stream of random numbers that choose captions; preprocessing has another


class Pipeline:
  """The stream of examples of one config, seed and split.

  Attributes:
    source: the records.
    preprocess: converts a record to the inputs of the system.
  """

  def __init__(
    self,
    config: DataConfig,
    seed: int,
    preprocess: Preprocess,
    names: Collection[str] = (),
    split: Split = 'train',
    encoded: Encoded | None = None,
    source: Source | None = None,
  ):
    """Opens the source; reads no image yet.

    Args:
      config: data section of the config.
      seed: seed of the order and of generated records.
      preprocess: converts a record to named arrays.
      names: names of the arrays that a batch needs.
      split: `train`, or held-out `combination` or `concept`.
      encoded: encoded entries by source index (from a cache, or synthetic).
      source: an open source to use instead of the config's.

    Raises:
      UserError: the source can't be opened, or its length differs from that of `encoded`.
    """
    self.source: Source = source or open_source(config, split, seed)
    self.preprocess = preprocess
    self._config = config
    self._reader = _Reader(self.source, preprocess, tuple(sorted(names)), encoded, seed % 2**32)
    self._most_replaced = int(config.most_skipped * len(self.source))
    if encoded is not None and len(encoded) != len(self.source):
      raise UserError(
        f'the cache holds {len(encoded)} records and the source {len(self.source)}: build it again'
      )
    order = grain.MapDataset.range(len(self.source)).seed(seed % 2**32).shuffle().repeat()
    self._order = order.map_with_index(_AddPosition())
    self._examples = self._order.map(self._reader)

  @classmethod
  def of(
    cls,
    system: System,
    split: Split = 'train',
    encoded: Encoded | None = None,
    source: Source | None = None,
  ) -> Pipeline:
    """The pipeline of a system, with its data config, seed, preprocessing and inputs."""
    config = system.config
    names = system.batch_spec(1).input_names(cached=encoded is not None)
    return cls(config.data, config.seed, system.preprocess, names, split, encoded, source)

  def __len__(self) -> int:
    """Number of records in an epoch."""
    return len(self.source)

  def digests(self) -> Mapping[str, str]:
    """Digests of the user's data (vpe_jax.data.records.StoredSource); empty for other data."""
    return self.source.digests() if self._config.is_user_data else {}

  def index_at(self, position: int) -> int:
    """Source index of the record at a stream position."""
    return self._order[position][1]

  def record(self, index: int) -> Record:
    """The record at a source index."""
    return self.source[index]

  def prompt(self, index: int) -> str:
    """The prompt of the record at a source index; the first one if it has several."""
    return self.preprocess.prompt(self.source[index])

  def prompt_at(self, position: int) -> str:
    """The prompt of the example at a stream position."""
    return self.preprocess.prompt(self._reader.record(position, self.index_at(position)))

  def examples(self, indices: Sequence[int]) -> Batch:
    """Selected records as one batch, for sample grids and for building a cache.

    A record with several captions has its first one.

    Args:
      indices: source indices; they are also the batch's `example`.

    Raises:
      BadRecord: a record can't be read.
    """
    arrays = [self._reader.arrays(index, index, self.source[index]) for index in indices]
    return self._reader.batch(_stack(arrays))

  def readable_examples(self, indices: Sequence[int]) -> tuple[Batch, dict[int, str]]:
    """As `examples`; arrays of another record stand for a record that can't be read.

    Returns:
      The batch, and the reason for each index whose record can't be read.

    Raises:
      BadRecord: too many records can't be read.
    """
    reasons: dict[int, str] = {}

    def read(index: int) -> Arrays:
      first = lambda used: self._reader.arrays(index, used, self.source[used])
      arrays, error = self._reader.readable(index, first)
      if error is not None:
        reasons[index] = str(error)
      return arrays

    arrays = [read(index) for index in indices]
    return self._reader.batch(_stack(arrays)), reasons

  def batches(
    self, start_example: int, batch_size: int, part: int = 0, parts: int = 1
  ) -> Batches:
    """One part of each global batch, in an endless stream from a position on.

    A record that can't be read is replaced by another one, which depends only on the seed and on
    its index. The iterator raises a UserError after more than the share `data.most_skipped` of
    different records.

    Args:
      start_example: stream position of the first example, which is the number of examples seen.
      batch_size: size B of a global batch. Part h of n has elements [h B/n, (h + 1) B/n).
      part: index h of the part that this host reads, see `sharding.host_part`.
      parts: number n of parts.

    Returns:
      An iterator of Batch with numpy leaves; close it, or use it in a `with` block.

    Raises:
      UserError: the batch size isn't a multiple of the number of parts, or `data.workers` is far
        above the number of cores, which would starve this process.
    """
    if batch_size < 1 or batch_size % parts:
      raise UserError(f'a batch of {batch_size} does not divide into {parts} parts')
    cores = os.cpu_count() or 1
    limit = max(MIN_WORKER_LIMIT, MAX_WORKERS_PER_CORE * cores)
    if self._config.workers > limit:
      raise UserError(
        f'data.workers is {self._config.workers}, and this host has {cores} CPU core(s): set it to '
        f'at most {limit}'
      )
    stacked = self._examples[start_example:].batch(batch_size // parts, batch_fn=_stack)
    return Batches(stacked[part::parts], self._config.workers, self._assemble())

  def _assemble(self) -> Callable[[Arrays], Batch]:
    """A function that assembles batches, and counts replaced records."""
    replaced: set[int] = set()

    def assemble(stacked: Arrays) -> Batch:
      new = {int(index) for index in stacked[_REPLACED] if index >= 0} - replaced
      replaced.update(new)
      if new and len(replaced) > self._most_replaced:
        last = self._reason(max(new))
        raise UserError(skipped_text(len(replaced), len(self), self._config.most_skipped, last))
      for error in map(self._reason, sorted(new)):
        if not isinstance(error, NotEncoded):
          logging.warning(SKIPPED, error)
      return self._reader.batch(stacked)

    return assemble

  def _reason(self, index: int) -> BadRecord:
    """Why the record at a source index can't be read."""
    try:
      self._reader.arrays(index, index, self.source[index])
    except BadRecord as error:
      return error
    return BadRecord(f'record {index} could not be read before, but can be now')


class Batches(contextlib.AbstractContextManager):
  """An endless iterator of batches, which owns reader threads or processes until it is closed."""

  def __init__(self, stacked: grain.MapDataset, workers: int, assemble: Callable[[Arrays], Batch]):
    if workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's reader processes read absl flags.
      options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)
      stream = stacked.to_iter_dataset(options)
      stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    else:
      options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCHED)
      stream = stacked.to_iter_dataset(options)
    self._iterator = iter(stream)
    self._assemble = assemble

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return self._assemble(next(self._iterator))

  def close(self) -> None:
    """Stops the reader threads or processes."""
    self._iterator.close()

  def __exit__(self, *_: Any) -> None:
    self.close()


@dataclasses.dataclass(frozen=True)
class _AddPosition(grain.transforms.MapWithIndex):
  """Maps a source index to (stream position, source index)."""

  def map_with_index(self, index: int, element: int) -> tuple[int, int]:
    return index, int(element)


@dataclasses.dataclass(frozen=True)
class _Reader(grain.transforms.Map):
  """Reads and preprocesses one example; pickled to reader processes."""

  source: Source
  preprocess: Preprocess
  names: tuple[str, ...]
  encoded: Encoded | None
  seed: int

  def map(self, element: tuple[int, int]) -> Arrays:
    return self(element)

  def __call__(self, element: tuple[int, int]) -> Arrays:
    position, index = element
    read = lambda used: self.arrays(position, used, self.record(position, used))
    arrays, error = self.readable(index, read)
    return arrays | {_REPLACED: np.int64(-1 if error is None else index)}

  def readable(self, index: int, read: Callable[[int], Arrays]) -> tuple[Arrays, BadRecord | None]:
    """Reads the record at a source index, or another one if it can't be read.

    Returns:
      The arrays, and the error of the record at this index.

    Raises:
      BadRecord: many others can't be read either.
    """
    used, first = index, None
    for attempt in range(_REPLACEMENTS):
      try:
        return read(used), first
      except BadRecord as error:
        first = first or error
        used = stable_hash('replacement', self.seed, index, attempt) % len(self.source)
    raise first

  def record(self, position: int, index: int) -> Record:
    """The record at a source index, with one of its captions, which the position chooses."""
    record = self.source[index]
    if not record.captions:
      return record
    choice = np.random.default_rng((self.seed, position, _CAPTION)).integers(len(record.captions))
    return dataclasses.replace(record, caption=record.captions[choice])

  def arrays(self, position: int, index: int, record: Record) -> Arrays:
    """The preprocessed arrays of a record, and its encoded entries."""
    rng = np.random.default_rng((self.seed, position))
    encoded = {} if self.encoded is None else self.encoded[index]
    inputs = self.preprocess(record, self.names, rng)
    return {EXAMPLE: np.int32(position), **{n: inputs[n] for n in self.names}, **encoded}

  def batch(self, stacked: Arrays) -> Batch:
    """Assigns stacked arrays to the fields of a Batch."""
    # Copies: arrays from reader processes are in shared memory, which Grain reuses.
    arrays = {name: np.array(leaf) for name, leaf in stacked.items() if name != _REPLACED}
    example, inputs = arrays.pop(EXAMPLE), {name: arrays.pop(name) for name in self.names}
    return Batch(example, inputs, arrays)


def skipped_text(count: int, total: int, most_skipped: float, last: object) -> str:
  """Error message for more unreadable records than the share `most_skipped`."""
  return (
    f'{count:,} of {total:,} records can not be read, more than data.most_skipped='
    f'{most_skipped:g}; the last: {last}'
  )


def _stack(examples: Sequence[Arrays]) -> Arrays:
  return {name: np.stack([arrays[name] for arrays in examples]) for name in examples[0]}
