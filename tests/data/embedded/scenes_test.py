"""Scenes: pure functions of (seed, split, index), consistent with their captions."""

from __future__ import annotations

import itertools

import pytest

from vpe_jax.data.embedded import scenes, shapes, vocabulary, wording
from vpe_jax.data.records import SPLITS
from vpe_jax.data.tokenizers import bpe

_NUMBERS = {1: ('a', 'an'), 2: ('two',), 3: ('three',), 4: ('four',)}


@pytest.fixture(scope='module')
def sample():
  return [scenes.scene(5, index) for index in range(1500)]


def test_scene_is_a_pure_function():
  again = scenes.Scenes(100, 'train', 5)
  assert again[37] == scenes.scene(5, 37) == again[37]
  assert scenes.scene(5, 37) != scenes.scene(6, 37)
  with pytest.raises(IndexError):
    again[100]


def test_known_scenes_do_not_change():
  """A change of the generator would silently change the data of every run."""
  assert [scenes.scene(0, i).caption for i in range(3)] == [
    'a drawing of a brown heart on white',
    'an image of a small brown square to the right of a yellow square '
    'against a light gray background',
    'an image of a big pig to the right of a big pink square on light yellow',
  ]


def test_boxes_are_inside_and_disjoint(sample):
  for record in sample:
    boxes = [box for cluster in record.truth.clusters for box in cluster.boxes]
    assert 1 <= len(boxes) <= scenes.MAX_OBJECTS
    for left, top, right, bottom in boxes:
      assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    for a, b in itertools.combinations(boxes, 2):
      assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], record.caption


def test_boxes_satisfy_the_relations(sample):
  relations = set()
  for record in sample:
    for relation in record.truth.relations:
      first, second = (record.truth.clusters[i].boxes for i in (relation.first, relation.second))
      near, far, axis = {
        'left': (first, second, 0),
        'right': (second, first, 0),
        'above': (first, second, 1),
        'below': (second, first, 1),
      }[relation.word]
      assert max(b[axis + 2] for b in near) <= min(b[axis] for b in far)
      relations.add((relation.word, relation.stated))
  assert len(relations) == 8


def test_captions_name_objects_colours_and_counts(sample):
  for record in sample:
    words = record.caption.split()
    for cluster in record.truth.clusters:
      noun = cluster.name if cluster.count == 1 else vocabulary.plural(cluster.name)
      assert noun in record.caption
      assert cluster.colour is None or cluster.colour in words
      assert any(number in words for number in _NUMBERS[cluster.count])
    if record.truth.background != 'white':
      assert record.truth.background in record.caption
    assert record.caption == wording.caption(record.truth, record.wording)


def test_sizes_differ_visibly(sample):
  sides = {None: [], 'small': [], 'large': []}
  for record in sample:
    if sum(cluster.count for cluster in record.truth.clusters) == 1:
      (cluster,) = record.truth.clusters
      left, top, right, bottom = cluster.boxes[0]
      sides[cluster.size].append(max(right - left, bottom - top))
  assert max(sides['small']) < min(sides[None]) and max(sides[None]) < min(sides['large'])
  assert min(sides['small']) > 0.25


def test_scenes_are_varied(sample):
  truths = [record.truth for record in sample]
  assert {t.background for t in truths} == {'white', *shapes.TINTS}
  assert {c.count for t in truths for c in t.clusters} == {1, 2, 3, 4}
  assert {c.colour for t in truths for c in t.clusters} == {None, *shapes.COLOURS}
  assert len({c.name for t in truths for c in t.clusters}) > 100
  assert len({record.caption for record in sample}) > 1000
  single = sum(sum(c.count for c in t.clusters) == 1 for t in truths) / len(truths)
  assert 0.3 < single < 0.55


@pytest.mark.parametrize('split', SPLITS)
def test_captions_are_short(split):
  tokenizer = bpe.shipped()
  lengths = [len(tokenizer.encode(scenes.scene(1, i, split).caption)) for i in range(500)]
  assert max(lengths) <= 24
