"""Edits of scenes by a seeded program: a picture before, one after, and what to do in words.

Edit i of seed s in a split is a pure function of (s, split, i). One thing (or several equal ones)
is added, removed, recoloured, replaced or moved; all else is the same in both pictures.
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
_WORDINGS = 4096
_LOW, _HIGH = 0.27, 0.73  # where things stand that are moved from one corner to another
_SIDES = (0.34, 0.42)
_ACCOMPANIED = 0.7  # share of moves beside a thing that stays

_ADDING = ('add {}', 'put {}', 'draw {}', 'place {}')
_REMOVING = ('remove {}', 'remove {}', 'delete {}', 'erase {}', 'take {} away')
_RECOLOURING = ('make {} {}', 'paint {} {}', 'turn {} {}', 'change the color of {} to {}')
_REPLACING = ('replace {} with {}', 'replace {} with {}', 'turn {} into {}', 'change {} into {}')
_MOVING = ('move {}', 'move {}', 'shift {}', 'put {}')

_Place = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Change:
  """Both pictures, and what is done to get from the first to the second."""

  before: Truth
  after: Truth
  words: str


class Edits(ProceduralSource):
  """Edits of scenes of one split: training holds none of which a picture is held out."""

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
    caption=change.words,
    group=GROUP,
    split=split,
    image=Painting(change.after),
    truth=change.after,
    wording=rng.randrange(_WORDINGS),
    reference=Painting(change.before),
    edit=Edit(kind, change.before),
  )


def _added(rng: random.Random, truth: Truth) -> _Change | None:
  if len(truth.clusters) < 2:
    return None
  place = rng.randrange(2)
  new, other = truth.clusters[place], truth.clusters[1 - place]
  relation = dataclasses.replace(truth.relations[0], stated=True)
  word = relation.word if place == 0 else splits.OPPOSITE[relation.word]
  words = rng.choice(_ADDING).format(noun_phrase(new))
  words = f'{words} {relation_phrase(word, rng.random())} {known_phrase(other)}'
  after = dataclasses.replace(truth, relations=(relation,))
  return _Change(Truth((other,), ground=truth.ground), after, words)


def _removed(rng: random.Random, truth: Truth) -> _Change | None:
  if len(truth.clusters) < 2:
    return None
  place = rng.randrange(2)
  words = rng.choice(_REMOVING).format(known_phrase(truth.clusters[place]))
  return _Change(truth, Truth((truth.clusters[1 - place],), ground=truth.ground), words)


def _recoloured(rng: random.Random, truth: Truth) -> _Change | None:
  place = rng.randrange(len(truth.clusters))
  old = truth.clusters[place]
  if not old.colour:
    return None
  new = dataclasses.replace(old, colour=rng.choice(tuple(shapes.COLOURS)))
  after = _with(truth, place, new)
  words = rng.choice(_RECOLOURING).format(known_phrase(old), new.colour)
  return after and _Change(truth, after, words)


def _replaced(rng: random.Random, truth: Truth) -> _Change | None:
  place = rng.randrange(len(truth.clusters))
  old = truth.clusters[place]
  new = scenes.things(rng, rng.choice(('shape', 'emoji')))
  sides = [max(right - left, bottom - top) for left, top, right, bottom in old.boxes]
  new = scenes.placed(dataclasses.replace(new, size=old.size), _centres(old), sides)
  after = _with(truth, place, new)
  if after is None:
    return None
  if rng.random() < 0.5:  # What is held out may be what comes, or what goes.
    truth, after, old, new = after, truth, new, old
  told = noun_phrase(dataclasses.replace(new, size=None))
  return _Change(truth, after, rng.choice(_REPLACING).format(known_phrase(old), told))


def _moved(rng: random.Random, truth: Truth) -> _Change | None:
  """One thing goes from a corner to another; the thing beside it both times stays where it is."""
  single = [dataclasses.replace(c, boxes=c.boxes[:1], size=None) for c in truth.clusters]
  rng.shuffle(single)
  corner = lambda: (rng.choice((_LOW, _HIGH)), rng.choice((_LOW, _HIGH)))
  put = lambda cluster, at, side: scenes.placed(cluster, (at,), side)
  side, here = rng.uniform(*_SIDES), corner()
  words = rng.choice(_MOVING).format(known_phrase(single[0]))
  if len(single) == 1 or rng.random() > _ACCOMPANIED:
    there = corner()
    if here == there:
      return None
    first, second = (
      Truth((put(single[0], at, side),), ground=truth.ground) for at in (here, there)
    )
    return _Change(first, second, f'{words} to the {_corner(there)} corner')
  still = put(single[1], here, rng.uniform(*_SIDES))
  x, y = here
  ends = [((_LOW + _HIGH - x, y), 'left' if x == _HIGH else 'right')]
  ends += [((x, _LOW + _HIGH - y), 'above' if y == _HIGH else 'below')]
  rng.shuffle(ends)
  first, second = (
    Truth((put(single[0], at, side), still), (Relation(0, word, 1, True),), truth.ground)
    for at, word in ends
  )
  said = relation_phrase(ends[1][1], rng.random())
  return _Change(first, second, f'{words} {said} {known_phrase(still)}')


_KINDS: dict[str, Callable[[random.Random, Truth], _Change | None]] = {
  'add': _added,
  'remove': _removed,
  'recolour': _recoloured,
  'replace': _replaced,
  'move': _moved,
}


def _with(truth: Truth, place: int, new: Cluster) -> Truth | None:
  """The scene with another cluster at a place; None where that can't be seen or told."""
  looks = {(c.name, c.colour) for c in truth.clusters}
  if (new.name, new.colour) in looks or (new.colour, truth.ground) in shapes.CLASHES:
    return None
  clusters = truth.clusters[:place] + (new,) + truth.clusters[place + 1 :]
  return dataclasses.replace(truth, clusters=clusters)


def _centres(cluster: Cluster) -> tuple[_Place, ...]:
  return tuple(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in cluster.boxes)


def _corner(place: _Place) -> str:
  x, y = place
  return f'{"top" if y == _LOW else "bottom"} {"left" if x == _LOW else "right"}'
