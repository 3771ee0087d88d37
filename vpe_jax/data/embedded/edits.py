"""Procedural edits of scenes: a source image, an instruction and a target image.

Edit i of seed s in a split is a pure function of (s, split, i). One cluster of objects is added,
removed, recoloured, replaced or moved; everything else is identical in both images.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from vpe_jax.data.embedded import scenes, shapes, splits
from vpe_jax.data.embedded.painting import Painting
from vpe_jax.data.embedded.wording import known_phrase, noun_phrase, relation_phrase
from vpe_jax.data.records import Cluster, Edit, ProceduralSource, Record, Relation, Split, Truth
from vpe_jax.storage import stable_hash

GROUP = 'scene edit'
_LOW, _HIGH = 0.27, 0.73  # coordinates of the corners between which objects move
_SIDES = (0.34, 0.42)  # range of object sizes in moves
_PAIR_SHARE = 0.7  # in scenes with two clusters: probability of a move relative to the second

_ADD_TEMPLATES = ('add {}', 'put {}', 'draw {}', 'place {}')
_REMOVE_TEMPLATES = ('remove {}', 'remove {}', 'delete {}', 'erase {}', 'take {} away')
_RECOLOUR_TEMPLATES = ('make {} {}', 'paint {} {}', 'turn {} {}', 'change the color of {} to {}')
_REPLACE_TEMPLATES = (
  'replace {} with {}',
  'replace {} with {}',
  'turn {} into {}',
  'change {} into {}',
)
_MOVE_TEMPLATES = ('move {}', 'move {}', 'shift {}', 'put {}')

_Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Change:
  """Ground truth before and after an edit, and the instruction."""

  before: Truth
  after: Truth
  instruction: str


class Edits(ProceduralSource):
  """Edits of scenes of one split.

  `train` excludes edits whose source or target scene has held-out content.
  """

  def compose(self, index: int) -> Record:
    """See ProceduralSource."""
    return edit(self.seed, index, self.split)


def edit(seed: int, index: int, split: Split = 'train') -> Record:
  """Edit number `index` of a seed and split."""
  rng = random.Random(stable_hash('edit', seed, split, index))
  kind = rng.choice(tuple(_KINDS))
  change = None
  while change is None or splits.split_of_edit(change.before, change.after) != split:
    change = _KINDS[kind](rng, scenes.compose(rng, split))
  return Record(
    id=f'edit/{split}/{seed}/{index}',
    caption=change.instruction,
    group=GROUP,
    split=split,
    image=Painting(change.after),
    truth=change.after,
    reference=Painting(change.before),
    edit=Edit(kind, change.before),
  )


def _add(rng: random.Random, truth: Truth) -> _Change | None:
  if len(truth.clusters) < 2:
    return None
  index = rng.randrange(2)
  new, other = truth.clusters[index], truth.clusters[1 - index]
  relation = dataclasses.replace(truth.relations[0], stated=True)
  word = relation.word if index == 0 else splits.OPPOSITE[relation.word]
  words = rng.choice(_ADD_TEMPLATES).format(noun_phrase(new))
  words = f'{words} {relation_phrase(word, rng.random())} {known_phrase(other)}'
  after = dataclasses.replace(truth, relations=(relation,))
  return _Change(Truth((other,), background=truth.background), after, words)


def _remove(rng: random.Random, truth: Truth) -> _Change | None:
  if len(truth.clusters) < 2:
    return None
  index = rng.randrange(2)
  words = rng.choice(_REMOVE_TEMPLATES).format(known_phrase(truth.clusters[index]))
  return _Change(truth, Truth((truth.clusters[1 - index],), background=truth.background), words)


def _recolour(rng: random.Random, truth: Truth) -> _Change | None:
  index = rng.randrange(len(truth.clusters))
  old = truth.clusters[index]
  if not old.colour:
    return None
  new = dataclasses.replace(old, colour=rng.choice(tuple(shapes.COLOURS)))
  after = _replace_cluster(truth, index, new)
  words = rng.choice(_RECOLOUR_TEMPLATES).format(known_phrase(old), new.colour)
  return after and _Change(truth, after, words)


def _replace(rng: random.Random, truth: Truth) -> _Change | None:
  index = rng.randrange(len(truth.clusters))
  old = truth.clusters[index]
  new = scenes.sample_cluster(rng, rng.choice(('shape', 'emoji')))
  sides = [max(right - left, bottom - top) for left, top, right, bottom in old.boxes]
  new = scenes.place_cluster(dataclasses.replace(new, size=old.size), _centres(old), sides)
  after = _replace_cluster(truth, index, new)
  if after is None:
    return None
  # `new` is never a held-out concept. Without this swap, held-out concepts would only be replaced,
  # and never replace another one.
  if rng.random() < 0.5:
    truth, after, old, new = after, truth, new, old
  phrase = noun_phrase(dataclasses.replace(new, size=None))
  return _Change(truth, after, rng.choice(_REPLACE_TEMPLATES).format(known_phrase(old), phrase))


def _move(rng: random.Random, truth: Truth) -> _Change | None:
  """Moves one object from a corner to another, alone or next to a second object that stays."""
  objects = [dataclasses.replace(c, boxes=c.boxes[:1], size=None) for c in truth.clusters]
  rng.shuffle(objects)
  sample_corner = lambda: (rng.choice((_LOW, _HIGH)), rng.choice((_LOW, _HIGH)))
  put = lambda cluster, centre, side: scenes.place_cluster(cluster, (centre,), side)
  side, corner = rng.uniform(*_SIDES), sample_corner()
  words = rng.choice(_MOVE_TEMPLATES).format(known_phrase(objects[0]))
  if len(objects) == 1 or rng.random() > _PAIR_SHARE:
    end = sample_corner()
    if corner == end:
      return None
    before, after = (
      Truth((put(objects[0], centre, side),), background=truth.background)
      for centre in (corner, end)
    )
    return _Change(before, after, f'{words} to the {_corner(end)} corner')
  anchor = put(objects[1], corner, rng.uniform(*_SIDES))
  x, y = corner
  placements = [((_LOW + _HIGH - x, y), 'left' if x == _HIGH else 'right')]
  placements += [((x, _LOW + _HIGH - y), 'above' if y == _HIGH else 'below')]
  rng.shuffle(placements)
  before, after = (
    Truth((put(objects[0], centre, side), anchor), (Relation(0, word, 1, True),), truth.background)
    for centre, word in placements
  )
  relation = relation_phrase(placements[1][1], rng.random())
  return _Change(before, after, f'{words} {relation} {known_phrase(anchor)}')


_KINDS: dict[str, Callable[[random.Random, Truth], _Change | None]] = {
  'add': _add,
  'remove': _remove,
  'recolour': _recolour,
  'replace': _replace,
  'move': _move,
}


def _replace_cluster(truth: Truth, index: int, new: Cluster) -> Truth | None:
  """The scene with one cluster replaced; None if the new one would be hard to see or name."""
  looks = {(c.name, c.colour) for c in truth.clusters}
  if (new.name, new.colour) in looks or (new.colour, truth.background) in shapes.CLASHES:
    return None
  clusters = truth.clusters[:index] + (new,) + truth.clusters[index + 1 :]
  return dataclasses.replace(truth, clusters=clusters)


def _centres(cluster: Cluster) -> tuple[_Point, ...]:
  return tuple(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in cluster.boxes)


def _corner(point: _Point) -> str:
  x, y = point
  return f'{"top" if y == _LOW else "bottom"} {"left" if x == _LOW else "right"}'
