"""Encoding before training: `data.encode=cached`.

One pass of the frozen encoders over all records of the training split fills a cache on disk; later
runs with the same data and encoders read it. The cache stores the entries that the system's
BatchSpec marks cacheable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vpe_jax import __version__, rng, sharding
from vpe_jax.checkpoints.frozen import FrozenNetworks
from vpe_jax.config import Config, DataConfig, to_dict
from vpe_jax.contracts import Batch, BatchSpec, System, UserError
from vpe_jax.data import cache, recipes
from vpe_jax.data.cache import Encoded, EncodedCache
from vpe_jax.data.embedded.synthetic import SyntheticEncoded
from vpe_jax.data.pipeline import SKIPPED, Pipeline, skipped_text
from vpe_jax.data.records import BadRecord, Record, Renderable

CHUNK = 64  # images encoded at a time, rounded up to a multiple of the number of devices
READERS = 2  # threads that render images ahead
PROBES = 16  # images whose content goes into the fingerprint
REPORT_EVERY = 10.0  # seconds
# Fields of the data section that determine the images.
_CONTENT = (
  'source',
  'scenes_share',
  'words_share',
  'most_words',
  'fonts',
  'examples',
  'image_size',
  'fit',
)
# Fields that select records. Those with default values are not in the fingerprint.
_SELECTION = (
  'language',
  'least_text_height',
  'filters',
  'held_out',
  'most_pixels',
  'most_bytes',
)


def open_training_data(
  config: Config,
  system: System,
  frozen: FrozenNetworks,
  mesh: jax.sharding.Mesh,
  images: Pipeline | None = None,
) -> Pipeline:
  """Opens the training split, with encoded entries from a cache if `data.encode` is `cached`.

  The process may end at any time while it encodes: complete shards of the cache are on disk.

  Args:
    config: configuration of the run.
    system: its system.
    frozen: its frozen networks.
    mesh: its device mesh.
    images: the training split, if it is open.

  Raises:
    UserError: the system has nothing to cache, its tokenizer has more tokens than the model has
      embeddings, or other hosts can't see the cache.
  """
  images = images or Pipeline.of(system)
  if config.data.encode == 'online':
    return images
  spec = system.batch_spec(1)
  if not spec.cacheable:
    raise UserError(
      f"system '{config.system}' encodes nothing that a cache can store: set data.encode=online"
    )
  if config.data.source == 'synthetic':
    encoded: Encoded = _synthetic(spec, len(images))
  elif isinstance(recipe := images.source, recipes.Recipe):
    data = dataclasses.replace(config.data, source=recipes.once(config.data.source))
    folders = Pipeline.of(system, source=recipe.once)
    encoded = _cached(dataclasses.replace(config, data=data), system, frozen, mesh, folders)
    encoded = recipes.Repeated(recipe, encoded)
  else:
    encoded = _cached(config, system, frozen, mesh, images)
  return Pipeline.of(system, encoded=encoded, source=images.source)


def fingerprint(
  config: DataConfig,
  seed: int,
  frozen: FrozenNetworks,
  images: Pipeline,
  settings: Mapping[str, Any],
) -> str:
  """Name of a cache: the data, encoder weights and settings that determine its content, as JSON."""
  parts = {
    'version': __version__,
    'layout': cache.LAYOUT,
    'data': {name: getattr(config, name) for name in _CONTENT},
    'seed': seed,
    'content': _content(config, images),
    'encoders': frozen.fingerprints,
    'settings': dict(settings),
  }
  if config.source_images:
    parts['references'] = True
  defaults = DataConfig()
  selection = {name: getattr(config, name) for name in _SELECTION}
  changed = {name: v for name, v in selection.items() if v != getattr(defaults, name)}
  if config.is_user_data and changed:
    parts['selection'] = to_dict(changed)
  return json.dumps(parts, sort_keys=True)


def _content(config: DataConfig, source: Pipeline) -> str:
  """A hash of PROBES records' images and, for the user's data, of the stamps of all files."""
  digest = hashlib.blake2b(digest_size=16)
  for index in np.linspace(0, len(source) - 1, PROBES).astype(int):
    for image in _images(source.record(int(index))):
      digest.update(_rendered(image, config.image_size))
  if config.is_user_data:
    for stamp in source.source.stamps():
      digest.update(stamp.encode())
  return digest.hexdigest()


def _rendered(image: Renderable, size: int) -> bytes:
  """The pixels of an image; the reason if it can't be read."""
  try:
    return image.render(size).tobytes()
  except BadRecord as error:
    return str(error).encode()


def _images(record: Record) -> list[Renderable]:
  """The record's image, and the source image if it is an edit."""
  return [image for image in (record.image, record.reference) if image is not None]


def _synthetic(spec: BatchSpec, count: int) -> SyntheticEncoded:
  """Random encoded entries of the shapes that the system trains on."""
  entries = tuple(
    (name, leaf.shape[1:], spec.codebooks.get(name, 0)) for name, leaf in spec.encoded.items()
  )
  return SyntheticEncoded(count, entries)


def _cached(
  config: Config,
  system: System,
  frozen: FrozenNetworks,
  mesh: jax.sharding.Mesh,
  images: Pipeline,
) -> Encoded:
  cacheable = system.batch_spec(1).cacheable
  settings = {**system.encoder_settings, 'entries': sorted(cacheable)}
  name = fingerprint(config.data, config.seed, frozen, images, settings)
  try:
    opened = cache.open_cache(name)
  except cache.DamagedCacheError as error:
    print(f'warning: {error}', flush=True)
    opened = None
  # All processes encode together or not at all.
  if multihost_utils.process_allgather(np.array(opened is not None)).all():
    return _check_readable(config.data, opened)
  started = False
  unreadable: dict[int, str] = {}

  def batches(stored: int) -> Iterator[dict[str, np.ndarray]]:
    nonlocal started
    started = True
    # Only the process that writes knows the number.
    start = int(multihost_utils.process_allgather(np.array(stored)).max())
    for arrays, reasons in _encode_all(config.seed, frozen, mesh, images, cacheable, start):
      unreadable.update(reasons)
      _check_share(config.data, unreadable, len(images))
      yield arrays

  if jax.process_index() == 0:
    cache.write_cache(name, batches, unreadable=unreadable)
  if not started:  # A process that writes nothing, or nothing is missing: stay in step.
    for _ in batches(len(images) if jax.process_index() == 0 else 0):
      pass
  multihost_utils.sync_global_devices('encoded')
  opened = cache.open_cache(name)
  if opened is None:
    raise UserError(
      f'{cache.location(name)} is not visible to all hosts: set VPE_JAX_CACHE to a shared folder, '
      'or data.encode=online'
    )
  return _check_readable(config.data, opened)


def _check_readable(config: DataConfig, opened: EncodedCache) -> EncodedCache:
  """Warns of the records that could not be encoded; errors as those of `_check_share`."""
  _check_share(config, opened.unreadable, len(opened))
  for reason in opened.unreadable.values():
    logging.warning(SKIPPED, reason)
  return opened


def _check_share(config: DataConfig, unreadable: Mapping[int, str], total: int) -> None:
  """Checks that at most the share `data.most_skipped` of the records could not be read.

  Raises:
    UserError: there are more.
  """
  if len(unreadable) > int(config.most_skipped * total):
    last = unreadable[max(unreadable)]
    raise UserError(skipped_text(len(unreadable), total, config.most_skipped, last))


def _encode_all(
  seed: int,
  frozen: FrozenNetworks,
  mesh: jax.sharding.Mesh,
  images: Pipeline,
  cacheable: frozenset[str],
  first: int,
) -> Iterator[tuple[dict[str, np.ndarray], dict[int, str]]]:
  """Yields consecutive chunks of records from `first` on, the same in every process.

  Yields:
    Encoded entries, and the reasons for records that can't be read, by index.
  """
  gather = jax.jit(lambda encoded: encoded, out_shardings=sharding.replicated(mesh))
  chunk = -(-CHUNK // mesh.size) * mesh.size
  offsets = sharding.host_positions(chunk, mesh)
  key = jax.device_put(rng.run_key(seed), sharding.replicated(mesh))
  total, start_time, reported = len(images), time.monotonic(), 0.0

  def read(start: int) -> tuple[Batch, dict[int, str]]:
    # The last chunk is filled with the last record.
    return images.readable_examples([min(start + offset, total - 1) for offset in offsets])

  with ThreadPoolExecutor(READERS) as readers:
    starts = list(range(first, total, chunk))
    pending = [readers.submit(read, start) for start in starts[:READERS]]
    for number, start in enumerate(starts):
      batch, unreadable = pending.pop(0).result()
      if number + READERS < len(starts):
        pending.append(readers.submit(read, starts[number + READERS]))
      encoded = frozen.encode_batch(sharding.put_batch(batch, mesh), key).encoded
      arrays = jax.device_get(gather({name: encoded[name] for name in cacheable}))
      done, seconds = min(start + chunk, total), time.monotonic() - start_time
      if seconds - reported > REPORT_EVERY or done == total:
        reported = seconds
        _say(f'encoding images: {done:,}/{total:,} ({(done - first) / seconds:.0f} a second)')
      reasons = {
        int(index): reason
        for text in sharding.gather_texts(json.dumps(unreadable))
        for index, reason in json.loads(text).items()
      }
      yield {name: array[: done - start] for name, array in arrays.items()}, reasons


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)
