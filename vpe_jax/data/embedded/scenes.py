"""Scenes composed by a seeded program: 1 to 4 emoji and plain shapes, with exact truth.

Scene i of seed s in a split is a pure function of (s, split, i). Most scenes are simple, and
things are large: what a small network can learn to draw from some ten thousand examples.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from vpe_jax.data.embedded import raster, shapes, splits, vocabulary, wording
from vpe_jax.data.embedded.painting import Painting, svg_of
from vpe_jax.data.records import Box, Cluster, ProceduralSource, Record, Relation, Split, Truth
from vpe_jax.storage import stable_hash

MOST = 4  # things in one scene
GROUP = 'scene'
_MARGIN = 0.02
_JITTER = 0.01  # how far each of several things may stray
_WORDINGS = 4096

# Share of scenes -> what is in them, one word a cluster; a plural stands for 2 to 4 things.
_PLANS = (
  (0.20, ('shape',)),
  (0.20, ('emoji',)),
  (0.14, ('shapes',)),
  (0.08, ('emojis',)),
  (0.13, ('shape', 'shape')),
  (0.11, ('shape', 'emoji')),
  (0.08, ('emoji', 'emoji')),
  (0.06, ('shapes', 'shape')),
)
_TINTED = 0.4  # share of scenes on tinted ground
_STATED = 0.75  # share of pairs whose caption says how they lie

# Where n equal things stand: places in the unit square, and the range of sides that fit there.
_Places = tuple[tuple[float, float], ...]
_ARRANGEMENTS: dict[int, tuple[tuple[_Places, float, float], ...]] = {
  2: (
    (((0.27, 0.5), (0.73, 0.5)), 0.36, 0.44),
    (((0.5, 0.27), (0.5, 0.73)), 0.36, 0.44),
    (((0.28, 0.28), (0.72, 0.72)), 0.36, 0.42),
    (((0.72, 0.28), (0.28, 0.72)), 0.36, 0.42),
  ),
  3: (
    (((0.5, 0.27), (0.27, 0.73), (0.73, 0.73)), 0.34, 0.42),
    (((0.27, 0.27), (0.73, 0.27), (0.5, 0.73)), 0.34, 0.42),
    (((0.18, 0.5), (0.5, 0.5), (0.82, 0.5)), 0.26, 0.29),
    (((0.5, 0.18), (0.5, 0.5), (0.5, 0.82)), 0.26, 0.29),
  ),
  4: (
    (((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)), 0.34, 0.42),
    (((0.5, 0.18), (0.18, 0.5), (0.82, 0.5), (0.5, 0.82)), 0.26, 0.29),
  ),
}
# The same along one half of the picture: places on its long axis.
_ROWS: dict[int, tuple[tuple[float, ...], float, float]] = {
  1: ((0.5,), 0.36, 0.44),
  2: ((0.27, 0.73), 0.34, 0.42),
  3: ((0.19, 0.5, 0.81), 0.25, 0.29),
}
_SINGLE = {None: (0.48, 0.62), 'small': (0.3, 0.36), 'large': (0.78, 0.9)}
_PAIRED = {None: (0.34, 0.42), 'small': (0.22, 0.26), 'large': (0.44, 0.46)}


class Scenes(ProceduralSource):
  """Scenes of one split: training holds neither held-out combinations nor concepts."""

  def compose(self, index: int) -> Record:
    """See ProceduralSource."""
    return scene(self.seed, index, self.split)


def scene(seed: int, index: int, split: Split = 'train') -> Record:
  """Scene number `index` of a seed and split."""
  rng = random.Random(stable_hash('scene', seed, split, index))
  truth = splits.first_of(split, lambda: compose(rng, split))
  words = rng.randrange(_WORDINGS)
  return Record(
    id=f'scene/{split}/{seed}/{index}',
    caption=wording.caption(truth, words),
    group=GROUP,
    split=split,
    image=Painting(truth),
    truth=truth,
    wording=words,
  )


def compose(rng: random.Random, split: Split) -> Truth:
  """A scene made up by `draw`, of any split; for `concept`, with a held-out one in it."""
  plan = _weighted(rng)
  while split == 'concept' and not any(kind.startswith('emoji') for kind in plan):
    plan = _weighted(rng)
  clusters = [things(rng, kind) for kind in plan]
  if split == 'concept':
    places = [i for i, cluster in enumerate(clusters) if cluster.kind == 'emoji']
    name = rng.choice(splits.held_out_concepts())
    place = rng.choice(places)
    clusters[place] = dataclasses.replace(clusters[place], name=name, code=vocabulary.emoji()[name])
  rng.shuffle(clusters)
  ground = rng.choice(tuple(shapes.TINTS)) if rng.random() < _TINTED else 'white'
  if any((cluster.colour, ground) in shapes.CLASHES for cluster in clusters):
    ground = 'white'
  if len(clusters) == 1:
    return Truth((_alone(rng, clusters[0]),), ground=ground)
  if clusters[0].name == clusters[1].name and clusters[0].colour == clusters[1].colour:
    return compose(rng, split)
  word = rng.choice(tuple(splits.OPPOSITE))
  pair = _side_by_side(rng, clusters, word)
  return Truth(pair, (Relation(0, word, 1, rng.random() < _STATED),), ground)


def _weighted(rng: random.Random) -> tuple[str, ...]:
  (plan,) = rng.choices([p for _, p in _PLANS], [share for share, _ in _PLANS])
  return plan


def things(rng: random.Random, kind: str) -> Cluster:
  """Things without places yet: `boxes` holds as many empty boxes as there are things.

  `kind` is `shape`, `emoji`, or the plural of one of them for 2 to 4 things.
  """
  count = rng.randint(2, MOST) if kind == 'emojis' or kind == 'shapes' else 1
  boxes = ((0.0, 0.0, 0.0, 0.0),) * count
  size = rng.choice((None, None, 'small', 'large')) if count == 1 else None
  if kind.startswith('shape'):
    colour = rng.choice(tuple(shapes.COLOURS))
    return Cluster(rng.choice(shapes.SHAPES), 'shape', boxes, colour=colour, size=size)
  name = rng.choice(splits.trained_concepts())
  return Cluster(name, 'emoji', boxes, code=vocabulary.emoji()[name], size=size)


def _alone(rng: random.Random, cluster: Cluster) -> Cluster:
  """Places the only cluster of a scene."""
  if cluster.count == 1:
    side = rng.uniform(*_SINGLE[cluster.size])
    slack = max(0.0, (1 - side) / 2 - _MARGIN) * 0.6
    centres = ((0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack)),)
  else:
    centres, low, high = rng.choice(_ARRANGEMENTS[cluster.count])
    side = rng.uniform(low, high)
  return _placed(rng, cluster, centres, side)


def _side_by_side(
  rng: random.Random, clusters: list[Cluster], word: str
) -> tuple[Cluster, Cluster]:
  """Places two clusters in the two halves of the picture, the first one on the side `word`."""
  found = []
  for index, cluster in enumerate(clusters):
    count = min(cluster.count, MOST - 1)
    along, low, high = _ROWS[count]
    if cluster.count != count:
      cluster = dataclasses.replace(cluster, boxes=cluster.boxes[:count])
    if count == 1:
      low, high = _PAIRED[cluster.size]
      along = (rng.uniform(0.4, 0.6),)
    near = 0.26 if (word in ('left', 'above')) == (index == 0) else 0.74
    upright = word in ('left', 'right')
    centres = tuple((near, a) if upright else (a, near) for a in along)
    found.append(_placed(rng, cluster, centres, rng.uniform(low, high)))
  return found[0], found[1]


def _placed(
  rng: random.Random, cluster: Cluster, centres: tuple[tuple[float, float], ...], side: float
) -> Cluster:
  """Gives each thing its box: ink of the longer side `side`, around its centre."""
  moved = []
  for x, y in centres:
    jitter = _JITTER if len(centres) > 1 else 0.0
    moved.append((x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)))
  return placed(cluster, moved, side)


def placed(
  cluster: Cluster, centres: Sequence[tuple[float, float]], side: float | Sequence[float]
) -> Cluster:
  """The cluster with a thing at each centre, moved inside the picture where it would stick out.

  `side` is the longer side of their ink, of all or of each, in fractions of the picture's.
  """
  left, top, right, bottom = raster.extent(svg_of(cluster))
  longer = max(right - left, bottom - top)
  sides = [side] * len(centres) if isinstance(side, float) else side
  boxes = []
  for (x, y), each in zip(centres, sides, strict=True):
    boxes.append(_box(x, y, each * (right - left) / longer, each * (bottom - top) / longer))
  return dataclasses.replace(cluster, boxes=tuple(boxes))


def _box(x: float, y: float, width: float, height: float) -> Box:
  left = min(max(x - width / 2, _MARGIN), 1 - _MARGIN - width)
  top = min(max(y - height / 2, _MARGIN), 1 - _MARGIN - height)
  return (left, top, left + width, top + height)
