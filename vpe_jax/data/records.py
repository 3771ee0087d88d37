"""Records of any data set: a caption, an image to render, and ground truth where it is known."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from vpe_jax.contracts import UserError
from vpe_jax.storage import stable_hash

Split = Literal['train', 'combination', 'concept']
Box = tuple[float, float, float, float]  # left, top, right, bottom: fractions of the image side

SPLITS: tuple[Split, ...] = ('train', 'combination', 'concept')
DEFAULT_COUNT = 65_536  # records of a generated source whose config sets examples=0


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Identical objects that a caption names together: `three red circles`.

  Attributes:
    name: noun, such as `dog` or `circle`.
    kind: `emoji` or `shape`.
    boxes: extent of each object, as fractions of the side of the image.
    code: OpenMoji file stem of an emoji; empty for a shape.
    colour: colour word of a shape; None for an emoji.
    size: `small` or `large` if the caption states the size, else None.
  """

  name: str
  kind: str
  boxes: tuple[Box, ...]
  code: str = ''
  colour: str | None = None
  size: str | None = None

  @property
  def count(self) -> int:
    """Number of objects."""
    return len(self.boxes)


@dataclasses.dataclass(frozen=True)
class Relation:
  """Spatial relation: cluster `first` is `word` of cluster `second`.

  Attributes:
    first: index of a cluster.
    word: `left`, `right`, `above` or `below`.
    second: index of the other cluster.
    stated: whether the caption states the relation. The image shows it either way.
  """

  first: int
  word: str
  second: int
  stated: bool


@dataclasses.dataclass(frozen=True)
class Word:
  """A written word and the extent of its ink, as fractions of the side of the image."""

  text: str
  box: Box


@dataclasses.dataclass(frozen=True)
class Writing:
  """Words in an image, in reading order.

  Attributes:
    words: the words and their boxes.
    font: one of vpe_jax.data.embedded.fonts.FONTS.
    colour: key of vpe_jax.data.embedded.shapes.COLOURS.
  """

  words: tuple[Word, ...]
  font: str
  colour: str


@dataclasses.dataclass(frozen=True)
class Truth:
  """Ground truth of an image: its exact content.

  Attributes:
    clusters: the objects, grouped as the caption names them.
    relations: spatial relations between two clusters; empty for a single cluster.
    background: colour name of the background, `white` or a key of TINTS (data/embedded/shapes.py).
    base: for an OpenMoji variant, the code of its base emoji; else empty.
    variant: attributes that distinguish a variant from its base, such as `('dark skin tone',)`.
    fade: name of the background colour at the bottom if the background is a gradient; else empty.
    writing: the words of an image of written words, which has no clusters; else None.
  """

  clusters: tuple[Cluster, ...]
  relations: tuple[Relation, ...] = ()
  background: str = 'white'
  base: str = ''
  variant: tuple[str, ...] = ()
  fade: str = ''
  writing: Writing | None = None


class Renderable(Protocol):
  """An image that can be rendered at any size."""

  def render(self, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3], transparency shown as white."""
    ...


@dataclasses.dataclass(frozen=True)
class Edit:
  """Ground truth of an edit.

  Attributes:
    kind: `add`, `remove`, `recolour`, `replace` or `move` for a scene; `skin tone`, `hair` or
      `gender` for an emoji.
    before: ground truth of the source image. `Record.truth` is that of the target image.
  """

  kind: str
  before: Truth


@dataclasses.dataclass(frozen=True)
class Record:
  """A caption and its image; in an edit, an instruction, a source image and a target image.

  Attributes:
    id: unique within a data source and stable across runs.
    caption: description of the image; for an edit, the instruction.
    group: broad class, such as `animals` or `scene`.
    split: `train`, or the held-out split that the record belongs to.
    image: the image; for an edit, the target image.
    truth: content of `image`; None if unknown (user data).
    wording: number that selects the wording of the caption (vpe_jax.data.embedded.wording); unused
      in edits of scenes.
    reference: source image of an edit; else None.
    edit: ground truth of an edit; None if unknown (user data), or if the record is no edit.
    captions: all captions if there are several; training draws one for each example and epoch.
      `caption` is the first. Empty if there is only one.
  """

  id: str
  caption: str
  group: str
  split: Split
  image: Renderable
  truth: Truth | None = None
  wording: int = 0
  reference: Renderable | None = None
  edit: Edit | None = None
  captions: tuple[str, ...] = ()


def caption_fields(captions: Sequence[str]) -> dict[str, Any]:
  """The fields `caption` and `captions` of a record with these captions."""
  first = captions[0] if captions else ''
  return {'caption': first, 'captions': tuple(captions) if len(captions) > 1 else ()}


class BadRecord(UserError):
  """A record of a user's data can't be used; the message names its location and the reason."""


class NotEncoded(BadRecord):
  """A record could not be read when the cache was written; the run has named it already."""


class Source(Protocol):
  """A data set: records by index.

  Several threads read a source at the same time, and each reader process gets a pickled copy.
  Therefore sources do not store open files or connections.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


class StoredSource(Source, Protocol):
  """A data set in user files, which may change between runs.

  `DataConfig.is_user_data` must be true for such a `data.source`: caches then depend on `stamps`.
  """

  def stamps(self) -> Iterator[str]:
    """Strings that change whenever an image file changes; opens no image."""
    ...

  def digests(self) -> Mapping[str, str]:
    """Maps each part of the data, such as `images`, to its number of items and their digest.

    Copies of the files have the same digests.
    """
    ...


class HashedSource(StoredSource, Protocol):
  """A stored source with a hash of each record's images, which `data.held_out` splits by."""

  def hashes(self) -> np.ndarray:
    """A hash of the image files of each record, uint64 [N] below 2^63; opens no image.

    Raises:
      UserError: the hashes are not stored.
    """
    ...


@dataclasses.dataclass(frozen=True)
class ProceduralSource(abc.ABC):
  """Procedurally generated records: each is a function of its index, split and seed.

  Attributes:
    count: number of records; any number is available.
    split: `train` or a held-out split; each subclass documents what `train` excludes.
    seed: each seed gives another sequence of records.
  """

  count: int
  split: Split = 'train'
  seed: int = 0

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self.count:
      raise IndexError(f'record {index} of {self.count}')
    return self.compose(index)

  @abc.abstractmethod
  def compose(self, index: int) -> Record:
    """Record number `index`."""


class NoHeldOutSplit(UserError):
  """The data source has only training data."""


def check_is_train(source: str, split: Split, cure: str = '') -> None:
  """Raises NoHeldOutSplit for a held-out split of a source that has none."""
  if split != 'train':
    raise NoHeldOutSplit(f'config.data.source={source} has no held-out split{cure}')


def digest_of(count: int, *parts: object) -> str:
  """A value of StoredSource.digests: a number of records, and a hash of the parts."""
  return f'{count:,} ({stable_hash(*parts):016x})'


def render(record: Record, size: int) -> np.ndarray:
  """The image of a record as uint8 [size, size, 3], transparency shown as white."""
  return record.image.render(size)


def edit_mask(record: Record, size: int) -> np.ndarray:
  """The mask of an edit: bool [size, size], true where source and target image differ.

  In generated records, pixels outside the edited objects are bitwise equal.
  """
  return np.any(render(record, size) != record.reference.render(size), axis=-1)
