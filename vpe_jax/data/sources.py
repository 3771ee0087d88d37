"""From the `data` section of a config to a source of records."""

from __future__ import annotations

import dataclasses
import math

from vpe_jax.config import FOLDER, FOLDERS, TFDS, DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.embedded.edits import Edits
from vpe_jax.data.embedded.emoji_edits import EmojiEdits
from vpe_jax.data.embedded.openmoji import OpenMoji
from vpe_jax.data.embedded.scenes import Scenes
from vpe_jax.data.embedded.synthetic import Synthetic
from vpe_jax.data.embedded.words import Words
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats.array_record import open_pictures
from vpe_jax.data.formats.folder import Asked
from vpe_jax.data.formats.tfds import open_tfds
from vpe_jax.data.recipes import open_recipe
from vpe_jax.data.records import Record, Source, Split

ENDLESS = 65_536  # records of a source without an end of its own, if the config says 0


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Two sources, interleaved evenly: `share` of the records come from `first`."""

  first: Source
  second: Source
  share: float
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count}')
    before, after = _firsts(index, self.share), _firsts(index + 1, self.share)
    return self.first[before] if after > before else self.second[index - before]


def _firsts(index: int, share: float) -> int:
  """How many of the records below `index` come from the first source."""
  return math.floor(index * share + 1e-9)


def open_source(config: DataConfig, split: Split = 'train', seed: int = 0) -> Source:
  """The records that a config asks for, of one split.

  Args:
    config: `source` says which, `examples` how many (0: all of a finite source, ENDLESS of one
      that a program makes).
    split: `train`, or held-out `combination` or `concept`.
    seed: of scenes and of the choice of words.

  Raises:
    UserError: the source has no such split, can't be read, is empty, or knows no filters.
  """
  count = config.examples
  keep = Filter(config.language, config.least_text_height, config.image_size, config.fit)
  if not config.in_folders and keep != Filter(size=keep.size, fit=keep.fit):
    raise UserError(
      f'data.language and data.least_text_height choose records of a folder, and '
      f'config.data.source is {config.source}: leave them out'
    )
  _check_references(config)
  if config.source in ('mixture', 'edits'):
    return _mixture(config, count or ENDLESS, split, seed)
  if config.source == 'scenes':
    return Scenes(count or ENDLESS, split, seed)
  if config.source == 'words':
    return Words(count or ENDLESS, split, seed)
  if config.source == 'openmoji':
    return OpenMoji(count, split, seed)
  if split != 'train' and (config.source == 'synthetic' or config.is_stored):
    raise UserError(
      f'config.data.source={config.source} has no held-out split; mixture, scenes, words, edits '
      'and openmoji do'
    )
  if config.source == 'synthetic':
    return Synthetic(count or ENDLESS, config.source_images)
  asked = Asked(config.prompt_field == 'caption', config.source_images)
  if config.source.startswith(TFDS):
    return open_tfds(config.source.removeprefix(TFDS), config.root, count, asked, config.fit)
  if not config.source.startswith(FOLDERS):
    return open_pictures(config.source.removeprefix(FOLDER), count, asked, keep)
  if count:
    raise UserError(
      f'data.examples={count} keeps the first pictures of one folder, and config.data.source names '
      'several: set it to 0'
    )
  return open_recipe(config.source, config.root, asked, keep)


def _mixture(config: DataConfig, count: int, split: Split, seed: int) -> Mixture:
  first, second = (Scenes, OpenMoji) if config.source == 'mixture' else (Edits, EmojiEdits)
  share = config.scenes_share
  scenes = _firsts(count, share)
  others = second(max(1, count - scenes), split, seed)
  return Mixture(first(scenes, split, seed), others, share, count)


def _check_references(config: DataConfig) -> None:
  """Refuses pictures before where a source has none, and edits without them."""
  pairs = config.source in ('edits', 'synthetic') or config.in_folders
  if config.source_images and not pairs:
    raise UserError(
      f'config.data.source={config.source} has no pictures before and after an edit, which this '
      'system trains on: set data.source to edits, or to a folder whose captions.jsonl has a '
      '"reference" in each line'
    )
  if config.source == 'edits' and not config.source_images:
    raise UserError(
      'config.data.source=edits has instructions for pictures before, which this system does not '
      'see: choose another data.source, or train configs/edit.py on it'
    )
