"""Wrong captions that differ from the true one in exactly one detail, in the same wording."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import openmoji, scenes, shapes, splits, vocabulary, wording
from vpe_jax.data.records import Box, Cluster, Record, Relation, Truth
from vpe_jax.storage import stable_hash

KINDS = ('object', 'colour', 'count')
_EMPTY_BOX: Box = (0.0, 0.0, 0.0, 0.0)


def distractors(record: Record, count: int, seed: int) -> list[tuple[str, str]]:
  """Distinct wrong captions for a record, alternating between KINDS.

  Args:
    record: record of OpenMoji or scenes.
    count: number of captions; fewer are returned if fewer are possible.
    seed: selects among the possible captions.

  Returns:
    (kind, caption) pairs. The kind is the detail that is wrong, one of KINDS. Skin tone and
    background colour have kind `colour`. OpenMoji records have no captions of kind `count`.

  Raises:
    UserError: the record has no ground truth.
  """
  return _round_robin(record, KINDS, count, seed)


def relation_distractors(record: Record, count: int, seed: int) -> list[tuple[str, str]]:
  """Captions with a wrong spatial relation; none if the true caption states no relation."""
  return _round_robin(record, ('relation',), count, seed)


def _round_robin(
  record: Record, kinds: tuple[str, ...], count: int, seed: int
) -> list[tuple[str, str]]:
  if record.truth is None:
    raise UserError(f'record {record.id} has no ground truth to make distractors from')
  rng = random.Random(stable_hash('distractors', seed, record.id))
  candidates = {}
  for kind in kinds:
    captions = sorted(set(_captions(record, kind)) - {record.caption})
    rng.shuffle(captions)
    candidates[kind] = captions
  selected: list[tuple[str, str]] = []
  while len(selected) < count and any(candidates.values()):
    for kind, captions in candidates.items():
      if captions and len(selected) < count:
        selected.append((kind, captions.pop()))
  return selected


def _captions(record: Record, kind: str) -> Iterator[str]:
  if record.group == scenes.GROUP:
    for truth in _changed_truths(record.truth, kind):
      yield wording.caption(truth, record.wording)
  else:
    item = openmoji.emojis()[record.truth.clusters[0].code]
    for other in _other_emoji(item, record.split, kind):
      yield openmoji.caption_of(other, record.wording)


def _changed_truths(truth: Truth, kind: str) -> Iterator[Truth]:
  if kind == 'relation':
    for relation in truth.relations:
      for word in splits.OPPOSITE:
        if relation.stated and word != relation.word:
          changed = Relation(relation.first, word, relation.second, True)
          yield dataclasses.replace(truth, relations=(changed,))
    return
  if kind == 'colour' and truth.background != 'white':
    for tint in shapes.TINTS:
      yield dataclasses.replace(truth, background=tint)
  for place, cluster in enumerate(truth.clusters):
    room = scenes.MAX_OBJECTS - sum(c.count for i, c in enumerate(truth.clusters) if i != place)
    for other in _other_clusters(cluster, kind, room):
      clusters = truth.clusters[:place] + (other,) + truth.clusters[place + 1 :]
      looks = [(c.name, c.colour, c.size) for c in clusters]
      if len(set(looks)) == len(looks):
        yield dataclasses.replace(truth, clusters=clusters)


def _other_clusters(cluster: Cluster, kind: str, room: int) -> Iterator[Cluster]:
  """Clusters that differ in one detail; `room` is the largest count that fits into the scene."""
  if kind == 'count':
    for count in range(1, room + 1):
      yield dataclasses.replace(cluster, boxes=(_EMPTY_BOX,) * count)
  elif kind == 'colour':
    for colour in shapes.COLOURS if cluster.colour else ():
      yield dataclasses.replace(cluster, colour=colour)
  elif cluster.kind == 'shape':
    for shape in shapes.SHAPES:
      yield dataclasses.replace(cluster, name=shape)
  else:
    # Held-out nouns are used only if the true noun is held out: novelty must not reveal the answer.
    is_new = cluster.name in splits.held_out_concepts()
    nouns = vocabulary.emoji_codes() if is_new else splits.trained_concepts()
    for noun in nouns:
      yield dataclasses.replace(cluster, name=noun, code=vocabulary.emoji_codes()[noun])


def _other_emoji(item: openmoji.Emoji, split: str, kind: str) -> Iterator[openmoji.Emoji]:
  if kind == 'object':
    for other in openmoji.emojis().values():
      is_similar = other.group == item.group and len(other.tones) == len(item.tones)
      may_be_new = split == 'concept' or not _has_held_out_concept(other)
      if is_similar and other.name != item.name and may_be_new:
        yield dataclasses.replace(other, tones=item.tones)
  elif kind == 'colour':
    for place, tone in itertools.product(range(len(item.tones)), openmoji.TONES):
      yield dataclasses.replace(item, tones=item.tones[:place] + (tone,) + item.tones[place + 1 :])
    for colour in shapes.COLOURS:
      pattern = rf'\b({"|".join(shapes.COLOURS)})\b'
      if re.search(pattern, item.phrase):
        phrase = re.sub(pattern, colour, item.phrase)
        phrase = re.sub(r'^an? (?=[a-z])', '', phrase)
        is_counted = item.phrase.startswith(('a ', 'an '))
        yield dataclasses.replace(
          item, phrase=wording.with_article(phrase) if is_counted else phrase
        )


def _has_held_out_concept(item: openmoji.Emoji) -> bool:
  return splits.has_held_out_concept(openmoji.truth_of(item))
