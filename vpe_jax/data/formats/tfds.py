"""Data sets of TensorFlow Datasets, read without TensorFlow: `tfds:NAME/SPLIT`.

The data set lies in `data.root` as TFDS prepares it with `file_format='array_record'` (which needs
TensorFlow for most of them, on any machine). Its code is not run: features are those that its
files name. A picture's bytes are decoded here, as those of any other source.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vpe_jax.contracts import UserError
from vpe_jax.data.formats.folder import FieldSpec, Bytes, first_of, valid
from vpe_jax.data.records import Record
from vpe_jax.storage import local

_INFO = 'dataset_info.json'
_FEATURES = 'features.json'
_CAPTIONS = ('caption', 'text', 'prompt')
_LABEL = 'label'
_GROUP = 'tfds'  # of records without labels
_VERSION = re.compile(r'\d+\.\d+\.\d+')
# What features.json may name: reading it imports the module of each.
_CLASS_KEYS = ('pythonClassName', 'python_class_name', 'type')
_KNOWN = re.compile(r'tensorflow_datasets\.core\.features\.')
_CURE = (
  "prepare it there with TFDS: builder.download_and_prepare(file_format='array_record'), on a "
  'machine with TensorFlow, and set data.root to its data_dir'
)


@dataclasses.dataclass(frozen=True)
class Tfds:
  """One split of a data set; records are read when drawn, in any order.

  Attributes:
    path: folder of the data set's version.
    split: its split, or a part of it such as `train[:90%]`.
    count: records that are used, the first ones.
    image: feature of the picture.
    caption: feature of the caption; '' for none.
    labels: name of each class, where there is a feature `label`.
    fit: how a picture becomes a square.
  """

  path: str
  split: str
  count: int
  image: str
  caption: str
  labels: tuple[str, ...]
  fit: str

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    """Reads one record.

    Raises:
      UserError: it can't be read.
    """
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count} in {self.path}')
    where = f'record {index} of {self.path} ({self.split})'
    try:
      values = _reader(os.getpid(), self.path, self.split)[index]
      caption = values[self.caption].decode() if self.caption else ''
      group = self.labels[values[_LABEL]] if self.labels else _GROUP
    except Exception as error:  # TFDS and array_record raise errors of many kinds.
      raise UserError(f'{where} can not be read ({error}); prepare it again') from error
    return Record(
      id=f'tfds/{self.split}/{index}',
      caption=valid(caption.strip(), where),
      group=group,
      split='train',
      image=Bytes(values[self.image], where, self.fit),
    )

  def stamps(self) -> Iterator[str]:
    """Name, size and date of every file; see vpe_jax.data.records.StoredSource."""
    for path in sorted(Path(self.path).iterdir()):
      found = path.stat()
      yield f'{path.name} {found.st_size} {found.st_mtime_ns}'


def open_tfds(name: str, root: str, count: int, fields: FieldSpec, fit: str) -> Tfds:
  """Opens a split of a data set.

  Args:
    name: NAME/SPLIT, or NAME for `train`; NAME may go on with a config and a version, as the
      folders do: NAME/CONFIG/VERSION/SPLIT (or NAME/CONFIG:VERSION). Without a version, the newest.
    root: the data_dir that the data set was prepared in.
    count: number of records to keep, the first ones, with a warning; 0 for all.
    fields: what pictures need. Without captions they need a feature `label`. The usual features of
      picture and caption are the only one of an image, and `caption`, `text` or `prompt`.
    fit: how pictures become squares.

  Raises:
    UserError: there is no such data set or split, it isn't in ArrayRecord, or it lacks what is
      fields for.
  """
  folder, split = _find(local(root), name)
  builder = _builder(str(folder))
  features = builder.info.features
  image = _picture(folder, fields.image, features)
  if fields.references:
    raise UserError(f'{folder} has no pictures before an edit: use folder:PATH')
  named = [feature for feature in _CAPTIONS if feature in _texts(features)]
  caption = fields.caption or (named[0] if named else '')
  if caption and caption not in _texts(features):
    raise UserError(f'{folder} has no text {caption}; its features: {", ".join(features)}')
  labels = tuple(getattr(features[_LABEL], 'names', None) or ()) if _LABEL in features else ()
  if fields.captions and not caption:
    raise UserError(
      f'{folder} has no caption among its features ({", ".join(features)}): set data.words=group '
      'to draw from the names of its labels'
    )
  if not fields.captions and not labels:
    raise UserError(f'{folder} has no label with names; its features: {", ".join(features)}')
  total = len(_reader(os.getpid(), str(folder), split))
  return Tfds(
    str(folder), split, first_of(total, count, f'{folder} ({split})'), image, caption, labels, fit
  )


def _find(root: Path, name: str) -> tuple[Path, str]:
  """The folder of a data set's version, and the split."""
  parts = re.sub(rf':(?={_VERSION.pattern})', '/', name).strip('/').split('/')
  if not parts[0] or '..' in parts:
    raise UserError(
      f'tfds:{name} names no data set: write tfds:NAME/SPLIT, as in tfds:cifar10/train'
    )
  depth = len(parts)
  while depth and not root.joinpath(*parts[:depth]).is_dir():
    depth -= 1
  folder, rest = root.joinpath(*parts[:depth]), parts[depth:]
  if not depth or len(rest) > 1:
    raise UserError(f'tfds:{name} is not in {root}: {_CURE}')
  if not (folder / _INFO).exists():
    versions = [path for path in folder.iterdir() if _VERSION.fullmatch(path.name)]
    if not versions:
      inside = ', '.join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
      raise UserError(
        f'tfds:{name}: {folder} holds no version of a data set, but {inside or "nothing"}'
      )
    folder = max(versions, key=lambda path: tuple(map(int, path.name.split('.'))))
  return folder, rest[0] if rest else 'train'


@functools.lru_cache(maxsize=8)
def _builder(folder: str) -> Any:
  """The TFDS metadata of a data set on disk."""
  # Importing it takes a second, which commands without such data sets needn't wait.
  import tensorflow_datasets as tfds

  path = Path(folder) / _FEATURES
  try:
    strange = [name for name in _classes(json.loads(path.read_text())) if not _KNOWN.match(name)]
    if strange:
      raise UserError(f'{path} names {strange[0]}, which is no feature of TFDS itself: not read')
    return tfds.builder_from_directory(folder)
  except UserError:
    raise
  except Exception as error:  # TFDS raises errors of many kinds.
    raise UserError(f'{folder} is no data set of TFDS ({_first_line(error)}): {_CURE}') from error


def _classes(values: Any) -> Iterator[str]:
  """Every class that a features.json names."""
  if isinstance(values, dict):
    yield from (name for key in _CLASS_KEYS if isinstance(name := values.get(key), str))
    values = list(values.values())
  for value in values if isinstance(values, list) else ():
    yield from _classes(value)


@functools.lru_cache(maxsize=8)
def _reader(process: int, folder: str, split: str) -> Sequence[Any]:
  """The records of a split, pictures as the bytes that are stored; each process opens its own."""
  import tensorflow_datasets as tfds

  del process
  builder = _builder(folder)
  as_stored = {name: tfds.decode.SkipDecoding() for name in _images(builder.info.features)}
  try:
    return builder.as_data_source(split, decoders=as_stored)
  except NotImplementedError as error:
    raise UserError(
      f'{folder} is in {builder.info.file_format.value}, which has no random access: {_CURE}'
    ) from error
  except Exception as error:  # TFDS raises errors of many kinds.
    known = ', '.join(builder.info.splits)
    raise UserError(
      f'{folder} has no split {split} ({_first_line(error)}); its splits: {known}'
    ) from error


def _images(features: Any) -> list[str]:
  import tensorflow_datasets as tfds

  return [name for name, kind in features.items() if isinstance(kind, tfds.features.Image)]


def _texts(features: Any) -> list[str]:
  import tensorflow_datasets as tfds

  return [name for name, kind in features.items() if isinstance(kind, tfds.features.Text)]


def _picture(folder: Path, wanted: str, features: Any) -> str:
  """The feature of the picture: the one that is fields for, `image`, or the only one."""
  found = _images(features)
  for name in (wanted,) if wanted else ('image', *found[: len(found) == 1]):
    if name in found:
      return name
  raise UserError(
    f'{folder} has no picture {wanted or "image"}, but {", ".join(found) or "none"} among '
    f'{", ".join(features)}: python -m vpe_jax.prepare --image=NAME takes another'
  )


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), '') or type(error).__name__
