"""Held-out splits: absent from training, though each part of a combination is trained."""

from __future__ import annotations

import pytest

from vpe_jax.config import DataConfig
from vpe_jax.data.embedded import openmoji, scenes, shapes, splits, vocabulary
from vpe_jax.data.records import Cluster, Truth
from vpe_jax.data.sources import open_source

_BOX = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(scope='module')
def training():
  source = open_source(DataConfig(examples=5000), 'train', 1)
  return [source[index] for index in range(5000)]


@pytest.fixture(scope='module')
def held_out():
  return {
    split: [open_source(DataConfig(examples=600), split, 1)[i] for i in range(600)]
    for split in ('combination', 'concept')
  }


def test_training_contains_nothing_held_out(training):
  ids = {record.id for record in training}
  assert len(ids) == len(training)
  for record in training:
    assert record.split == splits.split_of_truth(record.truth) == 'train'
    assert not splits.held_out(record.truth)
    assert not splits.mentions(record.caption, splits.held_out_concepts()), record.caption


def test_splits_share_no_record(training, held_out):
  codes = [
    {c.code for r in records for c in r.truth.clusters if r.group != 'scene'}
    for records in (training, *held_out.values())
  ]
  assert not codes[0] & codes[1] and not codes[0] & codes[2] and not codes[1] & codes[2]
  ids = [{r.id for r in records} for records in (training, *held_out.values())]
  assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]


def test_held_out_records_belong_to_their_split(held_out):
  for split, records in held_out.items():
    for record in records:
      assert record.split == splits.split_of_truth(record.truth) == split
  for record in held_out['combination']:
    assert splits.held_out(record.truth, stated=True), record.caption
  kinds = {pair[0] for r in held_out['combination'] for pair in splits.held_out(r.truth)}
  assert kinds == {'colour', 'count', 'relation', 'variant'}


def test_parts_of_held_out_combinations_occur_in_training(held_out):
  trained = [scenes.scene(2, index).truth for index in range(5000)]
  trained += [openmoji.truth_of(item) for item in openmoji.of_split('train')]
  parts = {
    part for truth in trained for pair in splits.combinations(truth) for part in _parts(pair)
  }
  parts |= {('variant', 0, truth.base) for truth in trained if not truth.variant}
  for record in held_out['combination']:
    for pair in splits.held_out(record.truth):
      for part in _parts(pair):
        assert part in parts, (record.caption, part)


def _parts(pair):
  kind, first, second = pair
  if kind == 'variant':
    return [('variant', 0, first), *(('variant', 1, word) for word in second.split(', '))]
  return [('name', first), (kind, 1, second)]


def test_every_shape_and_colour_is_trained():
  for shape in shapes.SHAPES:
    trained = [c for c in shapes.COLOURS if not splits.is_held_out(('colour', shape, c))]
    assert len(trained) >= 5
  excluded = [
    (s, c) for s in shapes.SHAPES for c in shapes.COLOURS if splits.is_held_out(('colour', s, c))
  ]
  assert len(excluded) >= 6


def test_held_out_concepts_include_variants_and_namesakes():
  concepts = splits.held_out_concepts()
  assert 8 <= len(concepts) <= 15
  codes = {vocabulary.emoji_codes()[noun] for noun in concepts}
  for item in openmoji.of_split('train'):
    assert item.code not in codes and item.base not in codes
    assert not splits.mentions(item.name, concepts)
  families = {item.base for item in openmoji.of_split('concept')}
  assert not families & {item.base for item in openmoji.of_split('train')}


def test_a_colour_in_the_name_of_an_emoji_is_a_combination():
  truth = Truth((Cluster('yellow heart', 'emoji', (_BOX,), code='1F49B'),))
  assert splits.is_held_out(('colour', 'heart', 'yellow'))
  assert splits.split_of_truth(truth) == 'combination'


def test_mentions_matches_whole_words():
  assert splits.mentions('two fish on white', ['fish'])
  assert splits.mentions('Oncoming buses', ['bus'])
  assert not splits.mentions('a fishing pole', ['fish'])
