"""Captions that are wrong in one detail, as negatives to train on.

Like the distractors of vpe_jax.data.embedded.distractors, but made one at a time, since a batch
needs hundreds. Each describes a scene that training may contain: a held-out combination that only
ever occurred in wrong captions would look wrong wherever it is true.
"""

from __future__ import annotations

import dataclasses
import random

from vpe_jax.data.embedded import scenes, shapes, splits, vocabulary, wording
from vpe_jax.data.records import Cluster, Record, Truth
from vpe_jax.storage import stable_hash

_TRIES = 8  # per caption: some come out true, or describe what is held out
_NOWHERE = (0.0, 0.0, 0.0, 0.0)
_KINDS = ('object', 'object', 'colour', 'count')  # objects are the hardest to tell apart


def near_misses(record: Record, count: int) -> list[str]:
  """At most `count` different wrong captions of a training scene.

  Each has one object, colour or count changed and is worded like the true one. The same record
  always gets the same ones; a drawing that is no scene has none.
  """
  if record.group != scenes.GROUP or record.truth is None:
    return []
  rng = random.Random(stable_hash('near misses', record.id))
  found: dict[str, None] = {}
  for _ in range(_TRIES * count):
    if len(found) == count:
      break
    truth = _changed(record.truth, rng)
    caption = wording.caption(truth, record.wording)
    looks = {(c.name, c.colour, c.size) for c in truth.clusters}
    is_wrong = caption != record.caption and len(looks) == len(truth.clusters)
    if is_wrong and splits.split_of_truth(truth) == 'train':
      found[caption] = None
  return list(found)


def _changed(truth: Truth, rng: random.Random) -> Truth:
  """The scene with one thing drawn anew; it may come out the same."""
  kind = rng.choice(_KINDS)
  place = rng.randrange(len(truth.clusters))
  cluster = truth.clusters[place]
  if kind == 'colour' and (not cluster.colour or (truth.ground != 'white' and rng.random() < 0.4)):
    if truth.ground == 'white':
      return truth
    return dataclasses.replace(truth, ground=rng.choice(tuple(shapes.TINTS)))
  if kind == 'colour':
    other = dataclasses.replace(cluster, colour=rng.choice(tuple(shapes.COLOURS)))
  elif kind == 'count':
    room = scenes.MOST - sum(c.count for c in truth.clusters) + cluster.count
    other = dataclasses.replace(cluster, boxes=(_NOWHERE,) * rng.randint(1, room))
  else:
    other = _other_object(cluster, rng)
  clusters = truth.clusters[:place] + (other,) + truth.clusters[place + 1 :]
  return dataclasses.replace(truth, clusters=clusters)


def _other_object(cluster: Cluster, rng: random.Random) -> Cluster:
  if cluster.kind == 'shape':
    return dataclasses.replace(cluster, name=rng.choice(shapes.SHAPES))
  name = rng.choice(splits.trained_concepts())
  return dataclasses.replace(cluster, name=name, code=vocabulary.emoji()[name])
