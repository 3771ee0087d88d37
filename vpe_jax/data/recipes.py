"""Several folders of pictures as one source, some of them more than once: `folders:a*3,b`.

How the paper mixes its data sets (its section 4 and appendix): each is a folder in `data.root`, as
formats/folder.py or formats/array_record.py reads it, and one that is up-sampled counts several
times.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vpe_jax.config import FOLDERS
from vpe_jax.contracts import UserError
from vpe_jax.data.cache import Encoded
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats.array_record import open_pictures
from vpe_jax.data.formats.folder import Asked
from vpe_jax.data.records import Record, Stored
from vpe_jax.storage import local_path

# The folders that configs name -> the data set that belongs there.
TITLES = {
  'blip3o': 'the 32M captioned pictures of BLIP3o',
  'text_atlas': 'TextAtlas5M',
  'anyword': 'AnyWord-3M',
  'nhr_edit': 'NHR-Edit',
  'unic_edit': 'UnicEdit',
  'sharegpt_4o_image': 'ShareGPT-4o-Image',
  'pico_banana': 'Pico-Banana-400K',
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Folders one after the other, each as often as it is asked for; nothing is copied.

  Attributes:
    names: of the folders.
    folders: their records.
    times: how often each counts.
  """

  names: tuple[str, ...]
  folders: tuple[Stored, ...]
  times: tuple[int, ...]

  @property
  def ends(self) -> tuple[int, ...]:
    """Index after each folder's last record."""
    counts = (len(folder) * n for folder, n in zip(self.folders, self.times, strict=True))
    return tuple(itertools.accumulate(counts))

  def __len__(self) -> int:
    return self.ends[-1]

  def __getitem__(self, index: int) -> Record:
    folder, row = self._find(index)
    record = self.folders[folder][row]
    return dataclasses.replace(record, id=f'{self.names[folder]}/{record.id}')

  @property
  def once(self) -> Recipe:
    """The same folders, of which each counts once."""
    return dataclasses.replace(self, times=(1,) * len(self.folders))

  def index_once(self, index: int) -> int:
    """Of the record at an index, the index in `once`."""
    folder, row = self._find(index)
    return sum(map(len, self.folders[:folder])) + row

  def _find(self, index: int) -> tuple[int, int]:
    """Number of the folder that the record at an index lies in, and its row there."""
    ends = self.ends
    if not 0 <= index < ends[-1]:
      raise IndexError(f'record {index} of {ends[-1]}')
    folder = bisect.bisect_right(ends, index)
    return folder, (index - (ends[folder - 1] if folder else 0)) % len(self.folders[folder])

  def stamps(self) -> Iterator[str]:
    """Those of every folder."""
    for folder in self.folders:
      yield from folder.stamps()


@dataclasses.dataclass(frozen=True)
class Repeated:
  """Encoded entries of a recipe's records, of which each folder was encoded once."""

  recipe: Recipe
  encoded: Encoded

  def __len__(self) -> int:
    return len(self.recipe)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self.encoded[self.recipe.index_once(index)]


def once(source: str) -> str:
  """The `data.source` of a recipe's `once`."""
  return FOLDERS + ','.join(parse(source))


def parse(source: str) -> dict[str, int]:
  """Names of folders -> how often each counts, of a `data.source` that config.py has checked."""
  entries = (entry.partition('*') for entry in source.removeprefix(FOLDERS).split(','))
  return {name.strip(): int(times or 1) for name, _, times in entries}


def open_recipe(source: str, root: str, asked: Asked, keep: Filter) -> Recipe:
  """Opens every folder of a recipe.

  Args:
    source: `folders:` and the recipe.
    root: where the folders are.
    asked: what each picture comes with.
    keep: which records are kept.

  Raises:
    UserError: a folder is missing, or see open_pictures.
  """
  entries = parse(source)
  paths = {name: local_path(root) / name for name in entries}
  for name, path in paths.items():
    if not path.is_dir():
      raise UserError(_missing(name, path, asked))
  folders = [open_pictures(str(path), 0, asked, keep) for path in paths.values()]
  return Recipe(tuple(entries), tuple(folders), tuple(entries.values()))


def _missing(name: str, where: Path, asked: Asked) -> str:
  """Error message for a missing data set."""
  fields = (
    '"file", "caption" and "reference" (the picture before)'
    if asked.references
    else ('"file" and "caption"')
  )
  return (
    f'the data set {TITLES.get(name, name)} is missing: its pictures belong in {where}, with a '
    f'captions.jsonl whose lines have {fields}; set data.root to where the folders are, or '
    'data.source to those that you have (python -m vpe_jax.prepare makes them of tars or parquet)'
  )
