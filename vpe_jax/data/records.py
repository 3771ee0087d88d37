"""One record of any data set: a caption, what is true of its picture, and how to draw it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np

Split = Literal['train', 'combination', 'concept']
Box = tuple[float, float, float, float]  # left, top, right, bottom; fractions of the side

SPLITS: tuple[Split, ...] = ('train', 'combination', 'concept')


@dataclasses.dataclass(frozen=True)
class Thing:
  """One object in a picture.

  Attributes:
    name: noun, such as `dog` or `circle`.
    kind: `emoji` or `shape`.
    colour: colour word of a shape; None for an emoji.
    size: `small` or `large` where the caption says so, else None.
    box: its extent, in fractions of the picture's side.
  """

  name: str
  kind: str
  colour: str | None
  size: str | None
  box: Box


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Equal things that a caption names together: `three red circles`.

  `code` is the OpenMoji file stem of an emoji and empty for a shape; `boxes` has one entry a
  thing. The other fields are those of Thing.
  """

  name: str
  kind: str
  boxes: tuple[Box, ...]
  code: str = ''
  colour: str | None = None
  size: str | None = None

  @property
  def count(self) -> int:
    """Number of things."""
    return len(self.boxes)


@dataclasses.dataclass(frozen=True)
class Relation:
  """Cluster number `first` is `word` (left, right, above, below) of cluster number `second`.

  `stated` tells whether the caption says so; the picture shows it either way.
  """

  first: int
  word: str
  second: int
  stated: bool


@dataclasses.dataclass(frozen=True)
class Word:
  """A written word, and the extent of its ink in fractions of the picture's side."""

  text: str
  box: Box


@dataclasses.dataclass(frozen=True)
class Writing:
  """Words that a picture shows, in reading order.

  `font` is one of embedded/fonts.py's FONTS, `colour` a key of embedded/shapes.py's COLOURS.
  """

  words: tuple[Word, ...]
  font: str
  colour: str


@dataclasses.dataclass(frozen=True)
class Truth:
  """Everything that is drawn, exactly.

  Attributes:
    clusters: the things, grouped as the caption names them.
    relations: of two clusters, how they lie; empty for one.
    ground: name of the ground colour, `white` or a key of vpe_jax.data.embedded.shapes.TINTS.
    base: of an OpenMoji variant, the code of its base emoji; else empty.
    variant: what sets it apart from its base, such as `('dark skin tone',)`.
    fade: name of the ground colour at the bottom, where the ground fades to another; else empty.
    writing: the words of a picture of words, which has no clusters.
  """

  clusters: tuple[Cluster, ...]
  relations: tuple[Relation, ...] = ()
  ground: str = 'white'
  base: str = ''
  variant: tuple[str, ...] = ()
  fade: str = ''
  writing: Writing | None = None

  @property
  def objects(self) -> tuple[Thing, ...]:
    """Every thing by itself, in drawing order."""
    return tuple(
      Thing(c.name, c.kind, c.colour, c.size, box) for c in self.clusters for box in c.boxes
    )

  @property
  def counts(self) -> dict[str, int]:
    """Things of each name."""
    totals: dict[str, int] = {}
    for cluster in self.clusters:
      totals[cluster.name] = totals.get(cluster.name, 0) + cluster.count
    return totals


class Picture(Protocol):
  """Something that can be drawn at any size."""

  def draw(self, size: int) -> np.ndarray:
    """The picture as uint8 [size, size, 3] on white ground."""
    ...


@dataclasses.dataclass(frozen=True)
class Edit:
  """Ground truth of an edit.

  Attributes:
    kind: what is done: `add`, `remove`, `recolour`, `replace` or `move` a thing of a scene; change
      the `skin tone`, `hair` or `gender` of an emoji.
    before: everything that the picture before shows; the record's truth is that of the one after.
  """

  kind: str
  before: Truth


@dataclasses.dataclass(frozen=True)
class Record:
  """A caption and its picture.

  Attributes:
    id: unique within a source and stable over runs.
    caption: what the picture shows, in words; of an edit, the instruction.
    group: a broad class, such as `animals` or `scene`.
    split: `train`, or which held-out split the record belongs to.
    picture: draws it.
    truth: what is in it; None where that is unknown (a user's own pictures).
    wording: number that fixes the choice of words (vpe_jax.data.embedded.wording).
    reference: of an edit, the picture before; else None.
    edit: what is known of an edit; None where that is nothing (a user's own), or there is none.
  """

  id: str
  caption: str
  group: str
  split: Split
  picture: Picture
  truth: Truth | None = None
  wording: int = 0
  reference: Picture | None = None
  edit: Edit | None = None


class Source(Protocol):
  """Records by index: what every data set is."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


class Stored(Source, Protocol):
  """A source whose pictures are a user's own, in files that may change from run to run."""

  def stamps(self) -> Iterator[str]:
    """Stamps that change when the files do; read without opening an image."""
    ...


@dataclasses.dataclass(frozen=True)
class Composed(abc.ABC):
  """A source that a program makes up: a record is a function of its place, split and seed.

  Attributes:
    count: number of records; any number can be asked for.
    split: which part of all; each source says what its training split lacks.
    seed: another seed gives other records.
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


def render(record: Record, size: int) -> np.ndarray:
  """The record's picture as uint8 [size, size, 3], on white where nothing is drawn."""
  return record.picture.draw(size)


def changed(record: Record, size: int) -> np.ndarray:
  """The mask of an edit: bool [size, size], true where source and target image differ.

  In records that a program made it is exact: everything else is equal to the last bit.
  """
  return np.any(render(record, size) != record.reference.draw(size), axis=-1)
