"""Distractors: wrong in exactly one detail, in the wording of the true caption."""

from __future__ import annotations

import collections

import pytest

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import openmoji, scenes, shapes, vocabulary
from vpe_jax.data.embedded.distractors import distractors, relation_distractors
from vpe_jax.data.embedded.synthetic import Synthetic
from vpe_jax.data.records import SPLITS

_COUNT_WORDS = {'a', 'an', 'two', 'three', 'four', 'is', 'are', 'there'}


def _nouns():
  names = [*shapes.SHAPES, *vocabulary.emoji_codes()]
  return {w for name in names for w in f'{name} {vocabulary.plural(name)}'.split()}


@pytest.mark.parametrize('split', SPLITS)
def test_scenes_have_enough_distractors_of_each_kind(split):
  for index in range(100):
    record = scenes.scene(3, index, split)
    wrong = distractors(record, 16, seed=0)
    captions = [caption for _, caption in wrong]
    assert len(set(captions)) == len(captions) == 16, record.caption
    assert record.caption not in captions
    kinds = collections.Counter(kind for kind, _ in wrong)
    assert kinds['object'] >= 5
    assert kinds['colour'] or all(c.colour is None for c in record.truth.clusters)


@pytest.mark.parametrize('kind', ['object', 'colour', 'count'])
def test_only_words_of_the_kind_change(kind):
  allowed = {
    'object': _nouns() | {'a', 'an'},
    'colour': set(shapes.COLOURS) | {'blue', 'green', 'yellow', 'pink', 'gray', 'a', 'an'},
    'count': _COUNT_WORDS | _nouns(),
  }[kind]
  checked = 0
  for index in range(200):
    record = scenes.scene(4, index)
    for other_kind, caption in distractors(record, 16, seed=1):
      if other_kind == kind:
        changed = collections.Counter(caption.split())
        changed.subtract(record.caption.split())
        assert {word for word, n in changed.items() if n} <= allowed, (record.caption, caption)
        checked += 1
  assert checked > 100


def test_only_stated_relations_have_relation_distractors():
  total = 0
  for index in range(200):
    record = scenes.scene(4, index)
    wrong = relation_distractors(record, 3, seed=0)
    stated = any(relation.stated for relation in record.truth.relations)
    assert len(wrong) == (3 if stated else 0)
    assert all(kind == 'relation' and caption != record.caption for kind, caption in wrong)
    total += len(wrong)
  assert total > 50


def test_emoji_distractors_of_kind_object_keep_the_skin_tone():
  source = openmoji.OpenMoji(count=200)
  for index in range(200):
    wrong = distractors(source[index], 8, seed=0)
    assert len(wrong) == 8, source[index].caption
    tones = [tone for tone in openmoji.TONES if f' {tone}' in source[index].caption]
    for kind, caption in wrong:
      if kind == 'object':
        assert all(tone in caption for tone in tones)


def test_the_seed_selects_the_distractors():
  record = scenes.scene(0, 0)
  assert distractors(record, 8, 0) == distractors(record, 8, 0) != distractors(record, 8, 1)


def test_a_record_without_ground_truth_is_rejected():
  with pytest.raises(UserError, match='synthetic/0'):
    distractors(Synthetic(1)[0], 4, 0)
