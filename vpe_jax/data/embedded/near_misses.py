"""Captions that are wrong in one detail, as hard negatives for training.

They resemble the distractors of vpe_jax.data.embedded.distractors, but are sampled instead of
enumerated, because a batch needs hundreds. All describe scenes that training may contain: if
held-out combinations occurred in wrong captions only, a model would learn that they are always
wrong.
"""

from __future__ import annotations

import dataclasses
import random

from vpe_jax.data.embedded import scenes, shapes, splits, vocabulary, wording
from vpe_jax.data.records import Cluster, Record, Truth
from vpe_jax.storage import stable_hash

_TRIES_PER_CAPTION = 8  # some samples equal the true caption, or are held out
_EMPTY_BOX = (0.0, 0.0, 0.0, 0.0)
_KINDS = ('object', 'object', 'colour', 'count')  # objects twice: the hardest ones


def near_misses(record: Record, count: int) -> list[str]:
  """At most `count` distinct wrong captions of a scene; none for other records.

  Each changes one object, colour or count, and keeps the wording of the true caption. The result is
  deterministic.
  """
  if record.group != scenes.GROUP or record.truth is None:
    return []
  rng = random.Random(stable_hash('near misses', record.id))
  captions: dict[str, None] = {}
  for _ in range(_TRIES_PER_CAPTION * count):
    if len(captions) == count:
      break
    truth = _changed(record.truth, rng)
    caption = wording.caption(truth, record.wording)
    looks = {(c.name, c.colour, c.size) for c in truth.clusters}
    is_wrong = caption != record.caption and len(looks) == len(truth.clusters)
    if is_wrong and splits.split_of_truth(truth) == 'train':
      captions[caption] = None
  return list(captions)


def _changed(truth: Truth, rng: random.Random) -> Truth:
  """The scene with one detail sampled again; the result may equal the scene."""
  kind = rng.choice(_KINDS)
  place = rng.randrange(len(truth.clusters))
  cluster = truth.clusters[place]
  tinted = truth.background != 'white'
  # If both can change colour, 40 % of the changes are to the background.
  if kind == 'colour' and (not cluster.colour or (tinted and rng.random() < 0.4)):
    if not tinted:
      return truth
    return dataclasses.replace(truth, background=rng.choice(tuple(shapes.TINTS)))
  if kind == 'colour':
    other = dataclasses.replace(cluster, colour=rng.choice(tuple(shapes.COLOURS)))
  elif kind == 'count':
    room = scenes.MAX_OBJECTS - sum(c.count for c in truth.clusters) + cluster.count
    other = dataclasses.replace(cluster, boxes=(_EMPTY_BOX,) * rng.randint(1, room))
  else:
    other = _other_object(cluster, rng)
  clusters = truth.clusters[:place] + (other,) + truth.clusters[place + 1 :]
  return dataclasses.replace(truth, clusters=clusters)


def _other_object(cluster: Cluster, rng: random.Random) -> Cluster:
  if cluster.kind == 'shape':
    return dataclasses.replace(cluster, name=rng.choice(shapes.SHAPES))
  name = rng.choice(splits.trained_concepts())
  return dataclasses.replace(cluster, name=name, code=vocabulary.emoji_codes()[name])
