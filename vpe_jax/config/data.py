"""The `data` section of a config, and the data sources that it may name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vpe_jax.config.fields import MAX_SIZE, check, check_sizes, did_you_mean
from vpe_jax.contracts import UserError

# Built-in sources: name -> `module:function`, an Opener (vpe_jax.data.sources).
SOURCES: Mapping[str, str] = {
  'mixture': 'vpe_jax.data.sources:open_mixture',
  'openmoji': 'vpe_jax.data.embedded.openmoji:open_openmoji',
  'scenes': 'vpe_jax.data.embedded.scenes:open_scenes',
  'words': 'vpe_jax.data.embedded.words:open_words',
  'edits': 'vpe_jax.data.sources:open_edits',
  'synthetic': 'vpe_jax.data.embedded.synthetic:open_synthetic',
}
# Prefixes of the other sources; a path, a list of folders or the name of a data set follows.
FOLDER, FOLDERS, TFDS = 'folder:', 'folders:', 'tfds:'
PACKED = ('webdataset:', 'parquet:')  # sources of vpe_jax.prepare only
CLASSES = 'classes:'  # prefix of class names: the tokenizer of a class-conditional model
PROMPT_FIELDS = ('caption', 'group')
FITS, ENCODES = ('pad', 'crop'), ('online', 'cached')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The training data.

  Attributes:
    source: `mixture` (OpenMoji, scenes and, with `words_share`, rendered words), `openmoji`,
      `scenes`, `words` (rendered words), `edits` (of scenes and of OpenMoji), `synthetic`; or the
      user's own data: `folder:PATH`, a folder of image files or one written by `python -m
      vpe_jax.prepare`; `folders:NAME*3,NAME`, several folders with repeat factors
      (vpe_jax.data.recipes); `tfds:NAME/SPLIT`, ArrayRecord files of TensorFlow Datasets
      (vpe_jax.data.formats.tfds).
    root: parent folder of the folders of `folders:` and of the data sets of `tfds:`.
    scenes_share: share of scenes in `edits`, and among scenes and OpenMoji in `mixture`.
    words_share: share of rendered words in `mixture`.
    most_words: maximum number of words in a rendered image, 1 to 3.
    fonts: names of the fonts of rendered words (empty: all five of vpe_jax.data.embedded.fonts).
    examples: number of records (0: all of a finite source).
    image_size: side of the square image in pixels.
    fit: how a rectangular image becomes a square: `pad` with white, or `crop` its centre.
    text_length: number of token slots for a caption; longer captions are cut, with a warning.
    encode: `online` (frozen encoders run during training) or `cached` (their outputs are computed
      once, before training).
    workers: reader processes per host (0: threads in this process).
    tokenizer: `assets:bpe` (for the embedded data) or `bpe:FILE`, a copy of it; a published one as
      `FAMILY:NAME`, where NAME is a folder or a hub id, and the family gives its special tokens (a
      key of FAMILIES in vpe_jax/data/tokenizers/special_tokens.py); or, for a class-conditional
      model, `classes:` and the class names (`cat,dog`), their number, or a text file with one name
      per line.
    prompt_field: field of a record that is its prompt: `caption`, or `group` (its class; in a
      folder of images, the name of the subfolder).
    near_misses: number of hard negatives per example of a scene: captions that are wrong in one
      detail.
    language: language of a folder's records, such as `en`; others are skipped (empty: no filter).
      `filters` has filters of single folders.
    least_text_height: minimum height of text in a folder's images, in pixels of the padded image;
      records with smaller text are skipped (0: no filter). See vpe_jax.data.filters.
    most_skipped: maximum share of unusable records, which are named in a warning and skipped: image
      files that can't be decoded, missing or malformed captions. More end the run, before step 1
      where the data are in a folder of image files.
    most_pixels: pixels of the largest image that is decoded, before it is reduced.
    most_bytes: size of the largest image file.
    held_out: records of the user's folders that are held out of training: a share (below 1), or
      from 1 on the number in each folder. A hash of the image selects them, so the share stays the
      same when images are added; of a fixed number, a few may then move to training.
    filters: filters of single folders of `folders:` instead of `language` and `least_text_height`:
      folder name -> a section with these two fields. Other sources ignore them.
    source_images: whether records are edits: a source image, an instruction (the caption), and the
      edited image.
  """

  source: str = 'mixture'
  root: str = 'data'
  scenes_share: float = 0.75
  words_share: float = 0.0
  most_words: int = 3
  fonts: tuple[str, ...] = ()
  examples: int = 0
  image_size: int = 64
  fit: str = 'pad'
  text_length: int = 32
  encode: str = 'online'
  workers: int = 0
  tokenizer: str = 'assets:bpe'
  near_misses: int = 0
  prompt_field: str = 'caption'
  language: str = ''
  least_text_height: int = 0
  most_skipped: float = 0.01
  most_pixels: int = 2**26
  most_bytes: int = 2**26
  held_out: float = 0.0
  filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source_images: bool = False

  def __post_init__(self) -> None:
    check_sizes(self, 'data.', most_pixels=1, most_bytes=1)
    for name in ('scenes_share', 'words_share', 'most_skipped'):
      check(self, 'data.', name, 0 <= getattr(self, name) <= 1, 'between 0 and 1')
    check(self, 'data.', 'most_words', 1 <= self.most_words <= 3, '1, 2 or 3')
    for name, known in {'encode': ENCODES, 'prompt_field': PROMPT_FIELDS, 'fit': FITS}.items():
      check(self, 'data.', name, getattr(self, name) in known, f'one of {", ".join(known)}')
    self._check_source()
    self._check_held_out()
    self._check_filters()
    # FAMILY and NAME are checked when the tokenizer is opened.
    known = f'assets:bpe, FAMILY:FOLDER, FAMILY:OWNER/NAME (a hub id), or {CLASSES}NAMES'
    valid = re.match(r'(?!assets:)[\w.-]+:.', self.tokenizer) or self.tokenizer == 'assets:bpe'
    check(self, 'data.', 'tokenizer', bool(valid), known)

  def _check_source(self) -> None:
    if self.source.startswith(PACKED):
      raise UserError(
        f'config.data.source is {self.source}: pack it first, with python -m vpe_jax.prepare '
        f'--source={self.source} --to=DIR, and set data.source to {FOLDER}DIR'
      )
    if self.source not in SOURCES and not self.is_user_data:
      stored = (f'{FOLDER}PATH', f'{FOLDERS}NAME*3,NAME', f'{TFDS}NAME/SPLIT')
      hint = did_you_mean(self.source, (*SOURCES, *stored))
      raise UserError(f"unknown config.data.source '{self.source}'{hint}")
    check(self, 'data.', 'source', self.source != FOLDER, f'{FOLDER}PATH')
    check(self, 'data.', 'source', self.source != TFDS, f'{TFDS}NAME/SPLIT')
    if self.source.startswith(FOLDERS):
      entries = self.source.removeprefix(FOLDERS).split(',')
      names = {entry.partition('*')[0].strip() for entry in entries}
      valid = all(re.fullmatch(r'[^*]*[^*\s][^*]*(\*[1-9]\d*)?', entry) for entry in entries)
      example = f'{FOLDERS} and different names, as in {FOLDERS}one*3,other'
      check(self, 'data.', 'source', valid and len(names) == len(entries), example)

  def _check_held_out(self) -> None:
    """Checks `held_out`; only folders have no splits of their own."""
    whole = self.held_out < 1 or self.held_out == int(self.held_out)
    valid = 0 <= self.held_out <= MAX_SIZE and whole
    check(self, 'data.', 'held_out', valid, 'a share below 1, or a whole number of records')
    cure = "0: this source has splits of its own, only the user's folders have none"
    check(self, 'data.', 'held_out', self.in_folders or not self.held_out, cure)

  def _check_filters(self) -> None:
    """Checks `filters`, whose keys are names of folders."""
    several = self.source.startswith(FOLDERS)
    entries = self.source.removeprefix(FOLDERS).split(',')
    names = [entry.partition('*')[0].strip() for entry in entries]
    for name, own in self.filters.items():
      if several and name not in names:
        raise UserError(
          f"config.data.filters.{name}: data.source={self.source} has no folder '{name}'"
          f'{did_you_mean(name, names)}'
        )
      cure = 'its fields are language, a word, and least_text_height, a whole number from 0'
      if not isinstance(own, Mapping):
        raise UserError(f'config.data.filters.{name} is {own!r}, not a section: {cure}')
      types = {'language': str, 'least_text_height': int}
      for field, value in own.items():
        valid = field in types and isinstance(value, types[field]) and not isinstance(value, bool)
        if not valid or (field == 'least_text_height' and not 0 <= value <= MAX_SIZE):
          raise UserError(f'config.data.filters.{name} has {field}={value!r}: {cure}')

  @property
  def in_folders(self) -> bool:
    """Whether the records are the user's own, in one or several folders."""
    return self.source.startswith((FOLDER, FOLDERS))

  @property
  def is_user_data(self) -> bool:
    """Whether the records are the user's own, in any format."""
    return self.in_folders or self.source.startswith(TFDS)
