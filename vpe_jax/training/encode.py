"""Codes and latents before training: `data.encode=cached`.

One pass of the frozen encoders over all records of the training split fills a cache on disk; later
runs with the same data and encoders find it there. Systems offer
`encode(frozen, images) -> (codes, latents)`.
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
from jax.experimental import multihost_utils

from vpe_jax import __version__, sharding
from vpe_jax.checkpoints.frozen import Frozen
from vpe_jax.codecs import choice
from vpe_jax.config import Config, DataConfig, to_dict
from vpe_jax.contracts import Examples, System, UserError
from vpe_jax.data import cache, recipes
from vpe_jax.data.cache import Encoded
from vpe_jax.data.embedded.synthetic import SyntheticCodes
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.records import Picture, Record

CHUNK = 64  # pictures encoded at a time, rounded up to a multiple of the devices
READERS = 2  # threads that draw pictures ahead
PROBES = 16  # pictures whose content goes into the fingerprint
_SAY_EVERY = 10.0  # seconds


def open_training_data(
  config: Config, system: System, frozen: Frozen, mesh: jax.sharding.Mesh
) -> Pipeline:
  """The training split, with codes and latents where the config asks for them beforehand.

  Raises:
    UserError: `data.encode` has an unknown value, the system has no encoders, the tokenizer has
      more tokens than the model has rows, or other hosts can't see the cache.
  """
  pictures = Pipeline(config.data, config.seed)
  for field in ('text_vocab', 'classes'):
    rows = getattr(config.model, field, None)
    if rows is not None and pictures.tokenizer.vocabulary > rows:
      raise UserError(
        f"tokenizer '{config.data.tokenizer}' has {pictures.tokenizer.vocabulary} tokens, but "
        f'model.{field} is {rows}: a model needs a row for each'
      )
  if config.data.encode == 'online':
    return pictures
  if frozen.encode is None:
    raise UserError(f"system '{config.system}' trains on pictures: set data.encode=online")
  if config.data.source == 'synthetic':
    encoded: Encoded = _synthetic_codes(system, len(pictures))
  elif isinstance(recipe := pictures.source, recipes.Recipe):
    data = dataclasses.replace(config.data, source=recipes.once(config.data.source))
    folders = Pipeline(data, config.seed, opened=(recipe.once, pictures.tokenizer))
    found = _cached(dataclasses.replace(config, data=data), frozen, mesh, folders)
    encoded = recipes.Repeated(recipe, found)
  else:
    encoded = _cached(config, frozen, mesh, pictures)
  opened = (pictures.source, pictures.tokenizer)
  return Pipeline(config.data, config.seed, encoded=encoded, opened=opened)


def fingerprint(
  config: DataConfig,
  seed: int,
  frozen: Frozen,
  pictures: Pipeline,
  settings: Mapping[str, Any],
) -> str:
  """What decides a cache's content: data, resolution, the encoders' weights and settings."""
  said = {
    'version': __version__,
    'data': [config.source, config.scenes_share, config.examples, config.image_size, config.fit],
    'seed': seed,
    'content': _content(config, pictures),
    'encoders': frozen.fingerprints,
    'settings': settings,
  }
  if config.references:
    said['references'] = True
  return json.dumps(said, sort_keys=True)


def encoder_settings(run: Config) -> dict[str, Any]:
  """How the frozen encoders of a run use their weights; where these lie doesn't matter."""
  kinds = (choice.PlanCodecConfig, choice.CodecsConfig, choice.PictureCodesConfig)
  kinds = [kind for kind in kinds if isinstance(run.model, kind)]
  fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
  said = {name: to_dict(getattr(run.model, name)) for name in fields - {'weights'}}
  return said | {'dtype': run.dtype}


def _content(config: DataConfig, pictures: Pipeline) -> str:
  """A hash of some pictures of the source, and of what tells its files from changed ones."""
  digest = hashlib.blake2b(digest_size=16)
  for index in np.linspace(0, len(pictures) - 1, PROBES).astype(int):
    for picture in _pictures(pictures.record(int(index))):
      digest.update(picture.draw(config.image_size).tobytes())
  if config.is_stored:
    for stamp in pictures.source.stamps():
      digest.update(stamp.encode())
  return digest.hexdigest()


def _pictures(record: Record) -> list[Picture]:
  """The record's picture, and the one before it where it is an edit."""
  return [picture for picture in (record.picture, record.reference) if picture is not None]


def _synthetic_codes(system: System, count: int) -> SyntheticCodes:
  """Random codes and latents of the shapes that the system trains on."""
  shapes = system.abstract_batch(1)
  return SyntheticCodes(
    count,
    shapes.codes.shape[1],
    system.codes,
    shapes.latents.shape[1:],
    getattr(system, 'picture_codes', 0),
    shapes.reference_latents is not None,
  )


def _cached(config: Config, frozen: Frozen, mesh: jax.sharding.Mesh, pictures: Pipeline) -> Encoded:
  name = fingerprint(config.data, config.seed, frozen, pictures, encoder_settings(config))
  try:
    found = cache.open_cache(name)
  except cache.DamagedCacheError as error:
    print(f'warning: {error}', flush=True)
    found = None
  # All processes encode together or not at all.
  if multihost_utils.process_allgather(np.array(found is not None)).all():
    return found
  batches = _encode_all(frozen, mesh, pictures)
  if jax.process_index() == 0:
    cache.write_cache(name, batches)
  else:
    for _ in batches:
      pass
  multihost_utils.sync_global_devices('encoded')
  found = cache.open_cache(name)
  if found is None:
    raise UserError(
      f'{cache.location(name)} is not visible to all hosts: set VPE_JAX_CACHE to a shared folder, '
      'or data.encode=online'
    )
  return found


def _encode_all(
  frozen: Frozen, mesh: jax.sharding.Mesh, pictures: Pipeline
) -> Iterator[tuple[np.ndarray, ...]]:
  """Codes and latents of consecutive records, chunk by chunk, whole in every process."""
  everywhere = jax.jit(lambda encoded: encoded, out_shardings=sharding.replicated(mesh))
  chunk = -(-CHUNK // mesh.size) * mesh.size
  mine = sharding.host_rows(chunk, mesh)
  total, began, said = len(pictures), time.monotonic(), 0.0

  def read(start: int) -> Examples:
    # The last chunk is filled with the last record.
    rows = [min(start + row, total - 1) for row in range(chunk)]
    return pictures.examples(rows[mine])

  with ThreadPoolExecutor(READERS) as readers:
    starts = list(range(0, total, chunk))
    waiting = [readers.submit(read, start) for start in starts[:READERS]]
    for number, start in enumerate(starts):
      batch = waiting.pop(0).result()
      if number + READERS < len(starts):
        waiting.append(readers.submit(read, starts[number + READERS]))
      found = frozen.with_codes(sharding.put_batch(batch, mesh))
      made = [leaf for kind in cache.KINDS if (leaf := getattr(found, kind)) is not None]
      made = jax.device_get(everywhere(made))
      done, seconds = min(start + chunk, total), time.monotonic() - began
      if seconds - said > _SAY_EVERY or done == total:
        said = seconds
        _say(f'encoding pictures: {done:,}/{total:,} ({done / seconds:.0f} a second)')
      yield tuple(array[: done - start] for array in made)


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)
