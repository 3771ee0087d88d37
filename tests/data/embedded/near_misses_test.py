"""Near misses: wrong in one detail, never held out, deterministic."""

import dataclasses

import numpy as np
import pytest

from tests.small_pipelines import small_pipeline
from vpe_jax.config import DataConfig
from vpe_jax.data.embedded import near_misses, splits, wording
from vpe_jax.data.embedded.openmoji import OpenMoji
from vpe_jax.data.embedded.scenes import Scenes


@pytest.fixture(scope='module')
def records():
  scenes = Scenes(200)
  return [scenes[i] for i in range(200)]


def test_near_misses_are_wrong_distinct_and_deterministic(records):
  for record in records:
    captions = near_misses.near_misses(record, 3)
    assert len(set(captions)) == len(captions) <= 3
    assert record.caption not in captions
    assert captions == near_misses.near_misses(record, 3)
  counts = [len(near_misses.near_misses(record, 3)) for record in records]
  assert np.mean(counts) > 2.9


def test_no_near_miss_describes_held_out_content(records, monkeypatch):
  described = []
  monkeypatch.setattr(
    near_misses.wording,
    'caption',
    lambda truth, words: described.append(truth) or str(truth),
  )
  for record in records:
    captions = near_misses.near_misses(record, 4)
    by_caption = {str(truth): truth for truth in described}
    for caption in captions:
      assert splits.split_of_truth(by_caption[caption]) == 'train'
  assert any(splits.split_of_truth(truth) != 'train' for truth in described)


def test_only_one_detail_changes(records, monkeypatch):
  """At most one cluster differs, or only the background does."""
  truths = []
  original = wording.caption
  monkeypatch.setattr(
    near_misses.wording, 'caption', lambda t, w: truths.append(t) or original(t, w)
  )
  for record in records[:50]:
    truths.clear()
    near_misses.near_misses(record, 3)
    for truth in truths:
      assert truth.relations == record.truth.relations
      pairs = zip(truth.clusters, record.truth.clusters, strict=True)
      changed = sum(a != b for a, b in pairs) + (truth.background != record.truth.background)
      assert changed <= 1


def test_records_without_a_scene_have_no_near_misses(records):
  assert near_misses.near_misses(OpenMoji()[0], 3) == []
  assert near_misses.near_misses(dataclasses.replace(records[0], truth=None), 3) == []


def test_pipelines_yield_tokens_of_near_misses():
  config = DataConfig(examples=40, near_misses=2)
  data = small_pipeline(config, names=('near', 'near_length'))
  batch = data.examples(range(40)).inputs
  assert batch['near'].shape == (40, 2, 32) and batch['near_length'].shape == (40, 2)
  for i in range(40):
    captions = near_misses.near_misses(data.record(i), 2)
    assert (batch['near_length'][i] > 0).sum() == len(captions)
    for ids, length, caption in zip(batch['near'][i], batch['near_length'][i], captions):
      expected, count = data.preprocess.tokenizer.encode_batch([caption], 32)
      np.testing.assert_array_equal(ids, expected[0])
      assert length == count[0]
