"""Several folders as one source, some of them up-sampled: `folders:a*3,b`.

Each folder is stored in `data.root`, in a form that formats/folder.py or formats/array_record.py
reads. The records of an up-sampled folder are repeated; no file is copied.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from vpe_jax.config import FOLDERS
from vpe_jax.contracts import UserError
from vpe_jax.data.cache import Encoded
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats.array_record import open_image_folder
from vpe_jax.data.formats.entries import FieldSpec
from vpe_jax.data.formats.folder import ReadOptions
from vpe_jax.data.records import Record, StoredSource
from vpe_jax.storage import local_path

# Folder names in shipped configs -> title of the data set, for error messages.
TITLES = {
  'blip3o': 'BLIP3o (32M captioned images)',
  'text_atlas': 'TextAtlas5M',
  'anyword': 'AnyWord-3M',
  'nhr_edit': 'NHR-Edit',
  'unic_edit': 'UnicEdit',
  'sharegpt_4o_image': 'ShareGPT-4o-Image',
  'pico_banana': 'Pico-Banana-400K',
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The records of several folders, concatenated; each folder may be repeated.

  Attributes:
    names: name of each folder.
    folders: records of each folder.
    times: number of times that each folder occurs.
  """

  names: tuple[str, ...]
  folders: tuple[StoredSource, ...]
  times: tuple[int, ...]

  @property
  def ends(self) -> tuple[int, ...]:
    """Index after each folder's last record."""
    counts = (len(folder) * n for folder, n in zip(self.folders, self.times, strict=True))
    return tuple(itertools.accumulate(counts))

  def __len__(self) -> int:
    return self.ends[-1]

  def __getitem__(self, index: int) -> Record:
    folder, offset = self._find(index)
    record = self.folders[folder][offset]
    return dataclasses.replace(record, id=f'{self.names[folder]}/{record.id}')

  @property
  def once(self) -> Recipe:
    """The same folders without repetitions."""
    return dataclasses.replace(self, times=(1,) * len(self.folders))

  def index_once(self, index: int) -> int:
    """Converts an index of this recipe to an index of `once`."""
    folder, offset = self._find(index)
    return sum(map(len, self.folders[:folder])) + offset

  def _find(self, index: int) -> tuple[int, int]:
    """Position of the folder that holds a record, and the index of the record in that folder."""
    ends = self.ends
    if not 0 <= index < ends[-1]:
      raise IndexError(f'record {index} of {ends[-1]}')
    folder = bisect.bisect_right(ends, index)
    return folder, (index - (ends[folder - 1] if folder else 0)) % len(self.folders[folder])

  def stamps(self) -> Iterator[str]:
    """Stamps of every folder; see vpe_jax.data.records.StoredSource."""
    for folder in self.folders:
      yield from folder.stamps()

  def digests(self) -> Mapping[str, str]:
    """Digests of every folder; see vpe_jax.data.records.StoredSource."""
    folders = zip(self.names, self.folders, strict=True)
    return {
      f'{part} of {name}': digest
      for name, folder in folders
      for part, digest in folder.digests().items()
    }


@dataclasses.dataclass(frozen=True)
class Repeated:
  """Encoded entries of a recipe, from a cache in which each folder is encoded once."""

  recipe: Recipe
  encoded: Encoded

  def __len__(self) -> int:
    return len(self.recipe)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self.encoded[self.recipe.index_once(index)]


def once(source: str) -> str:
  """The `data.source` of a recipe without its repetitions."""
  return FOLDERS + ','.join(parse(source))


def parse(source: str) -> dict[str, int]:
  """Folder names -> repetitions, for a `data.source` that DataConfig has checked."""
  entries = (entry.partition('*') for entry in source.removeprefix(FOLDERS).split(','))
  return {name.strip(): int(times or 1) for name, _, times in entries}


def open_recipe(
  source: str, root: str, options: ReadOptions, filters: Mapping[str, Filter] = MappingProxyType({})
) -> Recipe:
  """Opens every folder of a recipe.

  Args:
    source: `data.source`, such as `folders:a*3,b`.
    root: parent of the folders.
    options: how records are read.
    filters: folder name -> filter, instead of that of the options.

  Raises:
    UserError: a folder is missing, or open_image_folder rejects it.
  """
  entries = parse(source)
  paths = {name: local_path(root) / name for name in entries}
  for name, path in paths.items():
    if not path.is_dir():
      raise UserError(_missing(name, path, options.fields))
  folders = []
  for name, path in paths.items():
    own = filters.get(name, options.record_filter)
    folders.append(open_image_folder(str(path), dataclasses.replace(options, record_filter=own)))
  times = entries.values() if options.split == 'train' else [1] * len(entries)
  return Recipe(tuple(entries), tuple(folders), tuple(times))


def _missing(name: str, where: Path, fields: FieldSpec) -> str:
  """Error message for a missing data set."""
  keys = '"file" and "caption"'
  if fields.references:
    keys = '"file", "caption" and "reference" (the source image)'
  return (
    f'the data set {TITLES.get(name, name)} is missing: put its images in {where}, with a '
    f'captions.jsonl whose lines have {keys}; set data.root to the parent of the folders, or '
    'data.source to the folders that you have (python -m vpe_jax.prepare converts tars and parquet)'
  )
