"""Data sets of TensorFlow Datasets, read without TensorFlow: `tfds:NAME/SPLIT`.

The data set is stored in `data.root`, as TFDS prepares it with `file_format='array_record'`.
Preparing most data sets requires TensorFlow, but can be done on another machine. The code of the
data set does not run here: metadata files list the features. Images are decoded as those of any
other source.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpe_jax.contracts import UserError
from vpe_jax.data.formats.entries import FieldSpec, check_text, first_line
from vpe_jax.data.formats.folder import Bytes, ReadOptions, limited_count
from vpe_jax.data.records import BadRecord, Record, digest_of
from vpe_jax.data.transforms import Decoding
from vpe_jax.storage import local_path

_INFO = 'dataset_info.json'
_FEATURES = 'features.json'
_CAPTIONS = ('caption', 'text', 'prompt')
_LABEL = 'label'
_GROUP = 'tfds'  # class of records without labels
_VERSION = re.compile(r'\d+\.\d+\.\d+')
# Reading features.json imports the modules that it names, so only features of TFDS are allowed.
_CLASS_KEYS = ('pythonClassName', 'python_class_name', 'type')
_KNOWN = re.compile(r'tensorflow_datasets\.core\.features\.')
_CURE = (
  "prepare it there with TFDS: builder.download_and_prepare(file_format='array_record'), on a "
  'machine with TensorFlow, and set data.root to its data_dir'
)


@dataclasses.dataclass(frozen=True)
class Tfds:
  """One split of a data set, with random access.

  Attributes:
    path: folder of one version of the data set.
    split: name of a split, or a slice such as `train[:90%]`.
    count: only the first `count` records are used.
    image: name of the image feature.
    caption: name of the caption feature; '' for none.
    labels: class names of the feature `label`; empty if there are none.
    needs_label: whether a record without a label is unusable; TFDS labels such a record -1.
    decoding: how image files become arrays.
  """

  path: str
  split: str
  count: int
  image: str
  caption: str
  labels: tuple[str, ...]
  needs_label: bool
  decoding: Decoding

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    """Reads one record.

    Raises:
      BadRecord: the record can't be read.
    """
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count} in {self.path}')
    where = f'record {index} of {self.path} ({self.split})'
    try:
      values = _reader(os.getpid(), self.path, self.split)[index]
      caption = values[self.caption].decode() if self.caption else ''
      label = int(values[_LABEL]) if self.labels else -1
      group = self.labels[label] if label >= 0 else _GROUP
    except Exception as error:  # TFDS and array_record raise errors of many kinds.
      raise BadRecord(f'{where} can not be read ({first_line(error)}); prepare it again') from error
    if self.needs_label and label < 0:
      raise BadRecord(f'{where} has no label ({_LABEL}={label}): choose a split with labels')
    return Record(
      id=f'tfds/{self.split}/{index}',
      caption=check_text(caption.strip(), where),
      group=group,
      split='train',
      image=Bytes(values[self.image], where, self.decoding),
    )

  def stamps(self) -> Iterator[str]:
    """Name, size and modification time of every file; see vpe_jax.data.records.StoredSource."""
    for path in sorted(Path(self.path).iterdir()):
      stat = path.stat()
      yield f'{path.name} {stat.st_size} {stat.st_mtime_ns}'

  def digests(self) -> Mapping[str, str]:
    """Names and sizes of the files; see vpe_jax.data.records.StoredSource."""
    files = sorted((path.name, path.stat().st_size) for path in Path(self.path).iterdir())
    return {'files': digest_of(len(self), *files)}


def open_tfds(name: str, root: str, options: ReadOptions) -> Tfds:
  """Opens a split of a data set.

  Args:
    name: NAME/SPLIT, or NAME for the split `train`. NAME may include a config and a version, as in
      NAME/CONFIG/VERSION/SPLIT or NAME/CONFIG:VERSION; the default is the newest version.
    root: data_dir in which the data set was prepared.
    options: how records are read. Without captions, a feature `label` is required. The default
      image feature is `image`, or the only feature of type Image; the default caption feature is
      `caption`, `text` or `prompt`.

  Raises:
    UserError: the data set or split does not exist, is not in ArrayRecord, or lacks a feature.
  """
  fields: FieldSpec = options.fields
  folder, split = _find(local_path(root), name)
  builder = _builder(str(folder))
  features = builder.info.features
  image = _image_feature(folder, fields.image, features)
  if fields.references:
    raise UserError(f'{folder} has no source images for edits: use folder:PATH')
  texts = _texts(features)
  caption = fields.caption or next((name for name in _CAPTIONS if name in texts), '')
  if caption and caption not in texts:
    raise UserError(f'{folder} has no text feature {caption}; its features: {", ".join(features)}')
  labels = tuple(getattr(features[_LABEL], 'names', None) or ()) if _LABEL in features else ()
  if fields.captions and not caption:
    raise UserError(
      f'{folder} has no caption among its features ({", ".join(features)}): set '
      'data.prompt_field=group to use the names of its labels'
    )
  if not fields.captions and not labels:
    raise UserError(
      f'{folder} has no feature label with class names; its features: {", ".join(features)}'
    )
  total = len(_reader(os.getpid(), str(folder), split))
  used = limited_count(total, options.count, f'{folder} ({split})')
  return Tfds(
    str(folder), split, used, image, caption, labels, not fields.captions, options.decoding
  )


def _find(root: Path, name: str) -> tuple[Path, str]:
  """The folder of one version of a data set, and the split."""
  parts = re.sub(rf':(?={_VERSION.pattern})', '/', name).strip('/').split('/')
  if not parts[0] or '..' in parts:
    raise UserError(
      f'tfds:{name} names no data set: write tfds:NAME/SPLIT, such as tfds:cifar10/train'
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
      subfolders = ', '.join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
      raise UserError(
        f'tfds:{name}: {folder} has no version of a data set; its folders: {subfolders or "none"}'
      )
    folder = max(versions, key=lambda path: tuple(map(int, path.name.split('.'))))
  return folder, rest[0] if rest else 'train'


@functools.lru_cache(maxsize=8)
def _builder(folder: str) -> Any:
  """The TFDS metadata of a data set on disk."""
  # Imported here because it takes a second.
  import tensorflow_datasets as tfds

  path = Path(folder) / _FEATURES
  try:
    unknown = [name for name in _classes(json.loads(path.read_bytes())) if not _KNOWN.match(name)]
    if unknown:
      raise UserError(f'{path} names {unknown[0]}, which is not a feature of TFDS: not read')
    return tfds.builder_from_directory(folder)
  except UserError:
    raise
  except Exception as error:  # TFDS raises errors of many kinds.
    raise UserError(f'{folder} is not a data set of TFDS ({first_line(error)}): {_CURE}') from error


def _classes(values: Any) -> Iterator[str]:
  """All class names in the content of a features.json."""
  if isinstance(values, dict):
    yield from (name for key in _CLASS_KEYS if isinstance(name := values.get(key), str))
    values = list(values.values())
  for value in values if isinstance(values, list) else ():
    yield from _classes(value)


@functools.lru_cache(maxsize=8)
def _reader(process: int, folder: str, split: str) -> Sequence[Any]:
  """The records of a split, with encoded images; one reader per process (the cache key)."""
  import tensorflow_datasets as tfds

  del process
  builder = _builder(folder)
  decoders = {name: tfds.decode.SkipDecoding() for name in _images(builder.info.features)}
  try:
    return builder.as_data_source(split, decoders=decoders)
  except NotImplementedError as error:
    raise UserError(
      f'{folder} is in {builder.info.file_format.value}, which lacks random access: {_CURE}'
    ) from error
  except Exception as error:  # TFDS raises errors of many kinds.
    splits = ', '.join(builder.info.splits)
    raise UserError(
      f'{folder} has no split {split} ({first_line(error)}); its splits: {splits}'
    ) from error


def _images(features: Any) -> list[str]:
  import tensorflow_datasets as tfds

  return [name for name, kind in features.items() if isinstance(kind, tfds.features.Image)]


def _texts(features: Any) -> list[str]:
  import tensorflow_datasets as tfds

  return [name for name, kind in features.items() if isinstance(kind, tfds.features.Text)]


def _image_feature(folder: Path, name: str, features: Any) -> str:
  """The image feature: the named one; without a name, `image` or the only feature of type Image."""
  images = _images(features)
  if name in images:
    return name
  if not name and ('image' in images or len(images) == 1):
    return 'image' if 'image' in images else images[0]
  raise UserError(
    f'{folder} has no image feature {name or "image"}, but {", ".join(images) or "none"} among '
    f'{", ".join(features)}: python -m vpe_jax.prepare --image=NAME selects another'
  )
