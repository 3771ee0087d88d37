"""Opens the data source that the `data` section of a config names.

To add a data set, write a class that implements `Source` (vpe_jax.data.records) and an `Opener` in
a file of vpe_jax/data, and add a line to `SOURCES` in vpe_jax/config/data.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Protocol

from vpe_jax.config import FOLDER, FOLDERS, SOURCES, TFDS, DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.embedded.edits import Edits
from vpe_jax.data.embedded.emoji_edits import EmojiEdits
from vpe_jax.data.embedded.openmoji import OpenMoji
from vpe_jax.data.embedded.scenes import Scenes
from vpe_jax.data.embedded.words import of_config as words_of_config
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats.array_record import open_image_folder
from vpe_jax.data.formats.entries import FieldSpec
from vpe_jax.data.formats.folder import ReadOptions
from vpe_jax.data.formats.tfds import open_tfds
from vpe_jax.data.recipes import open_recipe
from vpe_jax.data.records import (
  DEFAULT_COUNT,
  ProceduralSource,
  Record,
  Source,
  Split,
  check_is_train,
)
from vpe_jax.data.transforms import Decoding


class Opener(Protocol):
  """A function that opens one split of a built-in data source; `config.SOURCES` names it."""

  def __call__(self, config: DataConfig, split: Split, seed: int) -> Source:
    """The source; arguments and errors as those of `open_source`."""
    ...


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Two sources, evenly interleaved: a fraction `share` of the records comes from `first`."""

  first: Source
  second: Source
  share: float
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count}')
    start, end = _count_of_first(index, self.share), _count_of_first(index + 1, self.share)
    return self.first[start] if end > start else self.second[index - start]


def _count_of_first(index: int, share: float) -> int:
  """Number of records below `index` that come from the first source."""
  return math.floor(index * share + 1e-9)  # The product may be slightly below an integer.


def open_source(config: DataConfig, split: Split = 'train', seed: int = 0) -> Source:
  """Opens one split of the data source of a config.

  Args:
    config: `source` names the data source, `examples` the number of records (0: all records of a
      finite source, DEFAULT_COUNT records of a generated one).
    split: `train`, or held-out `combination` or `concept`.
    seed: seed of generated records and of caption wording.

  Raises:
    UserError: the source has no such split, can't be read, is empty, does not support the filters
      of the config, or has source images although the system reads none, or vice versa.
  """
  if not config.in_folders and (config.language or config.least_text_height):
    raise UserError(
      f'data.language and data.least_text_height filter records of a folder, but '
      f'config.data.source is {config.source}: do not set them'
    )
  if config.is_user_data:
    return _open_stored(config, split)
  module, _, function = SOURCES[config.source].partition(':')
  opener: Opener = getattr(importlib.import_module(module), function)
  source = opener(config, split, seed)
  _check_references(config, source[0].reference is not None)
  return source


def _open_stored(config: DataConfig, split: Split) -> Source:
  """Opens the user's own data; errors as those of `open_source`."""
  if not config.held_out or split == 'concept':
    check_is_train(config.source, split, '; data.held_out=0.05 holds a share of your images out')
  _check_references(config, config.in_folders and config.source_images)
  options = ReadOptions(
    FieldSpec(config.prompt_field == 'caption', config.source_images),
    _filter(config, 'data.', config.language, config.least_text_height),
    Decoding.of(config),
    config.most_skipped,
    config.examples,
    config.held_out,
    split,
  )
  if config.source.startswith(TFDS):
    return open_tfds(config.source.removeprefix(TFDS), config.root, options)
  if not config.source.startswith(FOLDERS):
    return open_image_folder(config.source.removeprefix(FOLDER), options)
  if config.examples:
    raise UserError(
      f'data.examples={config.examples} selects the first images of one folder, and '
      'config.data.source names several: set it to 0'
    )
  filters = {
    name: _filter(config, f'data.filters.{name}.', **own) for name, own in config.filters.items()
  }
  return open_recipe(config.source, config.root, options, filters)


def _filter(
  config: DataConfig, section: str, language: str = '', least_text_height: int = 0
) -> Filter:
  return Filter(language, least_text_height, config.image_size, config.fit, section)


def open_mixture(config: DataConfig, split: Split, seed: int) -> Mixture:
  """Opens the source `mixture`: scenes, OpenMoji and rendered words; see Opener."""
  count, share = config.examples or DEFAULT_COUNT, config.words_share
  if not share:
    return _mixture(Scenes, OpenMoji, config, count, split, seed)
  words = _count_of_first(count, share)
  others = _mixture(Scenes, OpenMoji, config, max(1, count - words), split, seed)
  return Mixture(words_of_config(config, words, split, seed), others, share, count)


def open_edits(config: DataConfig, split: Split, seed: int) -> Mixture:
  """Opens the source `edits`: edits of scenes and of OpenMoji; see Opener."""
  return _mixture(Edits, EmojiEdits, config, config.examples or DEFAULT_COUNT, split, seed)


def _mixture(
  first: type[ProceduralSource],
  second: type[OpenMoji | EmojiEdits],
  config: DataConfig,
  count: int,
  split: Split,
  seed: int,
) -> Mixture:
  share = config.scenes_share
  scenes = _count_of_first(count, share)
  others = second(max(1, count - scenes), split, seed)
  return Mixture(first(scenes, split, seed), others, share, count)


def _check_references(config: DataConfig, has_references: bool) -> None:
  """Rejects a source without source images in an editing system, and edits in any other system."""
  if config.source_images and not has_references:
    raise UserError(
      f'config.data.source={config.source} has no source images, which this editing system trains '
      'on: set data.source to edits, or to a folder whose captions.jsonl has a "reference" in '
      'each line'
    )
  if has_references and not config.source_images:
    raise UserError(
      f'config.data.source={config.source} has instructions for source images, which this system '
      'does not read: choose another data.source, or train configs/edit.py on it'
    )
