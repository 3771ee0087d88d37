"""Procedural scenes of 1 to 4 emoji and plain shapes, with exact ground truth.

Scene i of seed s in a split is a pure function of (s, split, i). Most scenes are simple, and
objects are large, so that a small network can learn to generate them from about ten thousand
examples.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from vpe_jax.config import DataConfig
from vpe_jax.data.embedded import raster, shapes, splits, vocabulary, wording
from vpe_jax.data.embedded.painting import Painting, svg_of
from vpe_jax.data.records import (
  DEFAULT_COUNT,
  Box,
  Cluster,
  ProceduralSource,
  Record,
  Relation,
  Split,
  Truth,
)
from vpe_jax.storage import stable_hash

MAX_OBJECTS = 4  # in one scene
GROUP = 'scene'
_MARGIN = 0.02  # as a fraction of the image side, like all sizes below
_JITTER = 0.01  # maximum random displacement of each of several objects
_WORDINGS = 4096  # number of values of Record.wording

# (share of scenes, clusters of the scene); a plural stands for 2 to 4 objects (2 or 3 in a pair).
_LAYOUTS = (
  (0.20, ('shape',)),
  (0.20, ('emoji',)),
  (0.14, ('shapes',)),
  (0.08, ('emojis',)),
  (0.13, ('shape', 'shape')),
  (0.11, ('shape', 'emoji')),
  (0.08, ('emoji', 'emoji')),
  (0.06, ('shapes', 'shape')),
)
_TINTED_SHARE = 0.4  # share of scenes with a tinted background
_STATED_SHARE = 0.75  # share of pairs whose caption states their relation

# Number of objects -> arrangements: centres in the unit square, and the range of object sizes.
_Centres = tuple[tuple[float, float], ...]
_ARRANGEMENTS: dict[int, tuple[tuple[_Centres, float, float], ...]] = {
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
# The same within one half of the image: centres along its longer axis.
_LINES: dict[int, tuple[tuple[float, ...], float, float]] = {
  1: ((0.5,), 0.36, 0.44),
  2: ((0.27, 0.73), 0.34, 0.42),
  3: ((0.19, 0.5, 0.81), 0.25, 0.29),
}
# Size word -> range of sizes of one object: alone in the image, or alone in one half of it.
_SINGLE = {None: (0.48, 0.62), 'small': (0.3, 0.36), 'large': (0.78, 0.9)}
_PAIRED = {None: (0.34, 0.42), 'small': (0.22, 0.26), 'large': (0.44, 0.46)}


class Scenes(ProceduralSource):
  """Scenes of one split; `train` excludes held-out combinations and held-out concepts."""

  def compose(self, index: int) -> Record:
    """See ProceduralSource."""
    return scene(self.seed, index, self.split)


def open_scenes(config: DataConfig, split: Split, seed: int) -> Scenes:
  """Opens the source `scenes`; see vpe_jax.data.sources.Opener."""
  return Scenes(config.examples or DEFAULT_COUNT, split, seed)


def scene(seed: int, index: int, split: Split = 'train') -> Record:
  """Scene number `index` of a seed and split."""
  rng = random.Random(stable_hash('scene', seed, split, index))
  truth = splits.sample_of_split(split, lambda: compose(rng, split))
  number = rng.randrange(_WORDINGS)
  return Record(
    id=f'scene/{split}/{seed}/{index}',
    caption=wording.caption(truth, number),
    group=GROUP,
    split=split,
    image=Painting(truth),
    truth=truth,
    wording=number,
  )


def compose(rng: random.Random, split: Split) -> Truth:
  """Samples a scene of any split; for `concept`, it contains a held-out concept."""
  layout = _sample_layout(rng)
  while split == 'concept' and not any(kind.startswith('emoji') for kind in layout):
    layout = _sample_layout(rng)
  clusters = [sample_cluster(rng, kind) for kind in layout]
  if split == 'concept':
    indices = [i for i, cluster in enumerate(clusters) if cluster.kind == 'emoji']
    name = rng.choice(splits.held_out_concepts())
    index = rng.choice(indices)
    code = vocabulary.emoji_codes()[name]
    clusters[index] = dataclasses.replace(clusters[index], name=name, code=code)
  rng.shuffle(clusters)
  background = rng.choice(tuple(shapes.TINTS)) if rng.random() < _TINTED_SHARE else 'white'
  if any((cluster.colour, background) in shapes.CLASHES for cluster in clusters):
    background = 'white'
  if len(clusters) == 1:
    return Truth((_place_single(rng, clusters[0]),), background=background)
  if clusters[0].name == clusters[1].name and clusters[0].colour == clusters[1].colour:
    return compose(rng, split)
  word = rng.choice(tuple(splits.OPPOSITE))
  pair = _place_pair(rng, clusters, word)
  return Truth(pair, (Relation(0, word, 1, rng.random() < _STATED_SHARE),), background)


def _sample_layout(rng: random.Random) -> tuple[str, ...]:
  (layout,) = rng.choices([layout for _, layout in _LAYOUTS], [share for share, _ in _LAYOUTS])
  return layout


def sample_cluster(rng: random.Random, kind: str) -> Cluster:
  """Samples a cluster without positions: all its boxes are empty.

  Args:
    rng: source of randomness.
    kind: `shape` or `emoji` for one object; `shapes` or `emojis` for 2 to 4 objects.
  """
  count = rng.randint(2, MAX_OBJECTS) if kind in ('emojis', 'shapes') else 1
  boxes = ((0.0, 0.0, 0.0, 0.0),) * count
  size = rng.choice((None, None, 'small', 'large')) if count == 1 else None
  if kind.startswith('shape'):
    colour = rng.choice(tuple(shapes.COLOURS))
    return Cluster(rng.choice(shapes.SHAPES), 'shape', boxes, colour=colour, size=size)
  name = rng.choice(splits.trained_concepts())
  return Cluster(name, 'emoji', boxes, code=vocabulary.emoji_codes()[name], size=size)


def _place_single(rng: random.Random, cluster: Cluster) -> Cluster:
  """Places the only cluster of a scene."""
  if cluster.count == 1:
    side = rng.uniform(*_SINGLE[cluster.size])
    slack = max(0.0, (1 - side) / 2 - _MARGIN) * 0.6
    centres = ((0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack)),)
  else:
    centres, low, high = rng.choice(_ARRANGEMENTS[cluster.count])
    side = rng.uniform(low, high)
  return _place_with_jitter(rng, cluster, centres, side)


def _place_pair(rng: random.Random, clusters: list[Cluster], word: str) -> tuple[Cluster, Cluster]:
  """Places two clusters in the two halves of the image, the first in the half that `word` names."""
  pair = []
  for index, cluster in enumerate(clusters):
    count = min(cluster.count, MAX_OBJECTS - 1)
    along, low, high = _LINES[count]
    if cluster.count != count:
      cluster = dataclasses.replace(cluster, boxes=cluster.boxes[:count])
    if count == 1:
      low, high = _PAIRED[cluster.size]
      along = (rng.uniform(0.4, 0.6),)
    near = 0.26 if (word in ('left', 'above')) == (index == 0) else 0.74
    is_horizontal = word in ('left', 'right')
    centres = tuple((near, a) if is_horizontal else (a, near) for a in along)
    pair.append(_place_with_jitter(rng, cluster, centres, rng.uniform(low, high)))
  return pair[0], pair[1]


def _place_with_jitter(
  rng: random.Random, cluster: Cluster, centres: tuple[tuple[float, float], ...], side: float
) -> Cluster:
  """Places objects at jittered centres; `side` is the longer side of their ink."""
  jittered = []
  for x, y in centres:
    jitter = _JITTER if len(centres) > 1 else 0.0
    jittered.append((x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)))
  return place_cluster(cluster, jittered, side)


def place_cluster(
  cluster: Cluster, centres: Sequence[tuple[float, float]], side: float | Sequence[float]
) -> Cluster:
  """Places an object at each centre, shifted to fit inside the image.

  Args:
    cluster: objects without positions.
    centres: (x, y) of each object, as fractions of the image side.
    side: longer side of the ink, one for all objects or one for each, as a fraction of the image
      side.
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
