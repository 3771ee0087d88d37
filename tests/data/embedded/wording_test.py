"""Captions: correct, varied, and with equal wording for near misses."""

from __future__ import annotations

import dataclasses

from vpe_jax.data.embedded import wording
from vpe_jax.data.records import Cluster, Relation, Truth

_BOX = (0.0, 0.0, 1.0, 1.0)
_CIRCLES = Cluster('circle', 'shape', (_BOX,) * 3, colour='red')
_OWL = Cluster('owl', 'emoji', (_BOX,), code='1F989', size='small')


def test_noun_phrases():
  assert wording.noun_phrase(_CIRCLES) == 'three red circles'
  assert wording.noun_phrase(_OWL) == 'a small owl'
  assert wording.noun_phrase(dataclasses.replace(_OWL, size=None)) == 'an owl'


def test_captions_of_one_truth_are_varied_and_complete():
  truth = Truth((_CIRCLES, _OWL), (Relation(0, 'left', 1, True),), 'light blue')
  captions = {wording.caption(truth, n) for n in range(200)}
  assert len(captions) > 40
  for caption in captions:
    assert 'three red circles' in caption and 'owl' in caption and 'light blue' in caption
    assert 'left' in caption and 'right' not in caption
    assert 'small' in caption or 'little' in caption
    assert 'there is' not in caption


def test_unstated_relations_are_not_mentioned():
  truth = Truth((_CIRCLES, _OWL), (Relation(0, 'left', 1, False),))
  captions = {wording.caption(truth, n) for n in range(100)}
  assert not any(word in c for c in captions for word in ('left', 'right', 'above', 'below'))


def test_a_near_miss_differs_in_one_word():
  truth = Truth((_CIRCLES,), background='light pink')
  other = dataclasses.replace(truth, clusters=(dataclasses.replace(_CIRCLES, colour='blue'),))
  for n in range(50):
    assert wording.caption(truth, n).replace('red', 'blue') == wording.caption(other, n)


def test_emoji_captions_name_every_tone():
  captions = {wording.emoji_caption('a leg', ('dark skin tone',), n) for n in range(100)}
  assert len(captions) > 8
  assert all('a leg' in c and 'dark skin tone' in c for c in captions)
