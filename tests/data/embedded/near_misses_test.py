"""Near misses: wrong in one thing, never about what is held out, the same every time."""

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


def test_they_are_wrong_different_and_repeatable(records):
  for record in records:
    found = near_misses.near_misses(record, 3)
    assert len(set(found)) == len(found) <= 3
    assert record.caption not in found
    assert found == near_misses.near_misses(record, 3)
  counts = [len(near_misses.near_misses(record, 3)) for record in records]
  assert np.mean(counts) > 2.9


def test_none_describes_what_training_holds_out(records, monkeypatch):
  described = []
  monkeypatch.setattr(
    near_misses.wording,
    'caption',
    lambda truth, words: described.append(truth) or str(truth),
  )
  for record in records:
    chosen = near_misses.near_misses(record, 4)
    by_caption = {str(truth): truth for truth in described}
    for caption in chosen:
      assert splits.split_of_truth(by_caption[caption]) == 'train'
  assert any(splits.split_of_truth(truth) != 'train' for truth in described)


def test_only_one_thing_changes(records, monkeypatch):
  """Clusters differ in at most one place, or only the ground does."""
  seen = []
  original = wording.caption
  monkeypatch.setattr(near_misses.wording, 'caption', lambda t, w: seen.append(t) or original(t, w))
  for record in records[:50]:
    seen.clear()
    near_misses.near_misses(record, 3)
    for truth in seen:
      assert truth.relations == record.truth.relations
      pairs = zip(truth.clusters, record.truth.clusters, strict=True)
      changed = sum(a != b for a, b in pairs) + (truth.ground != record.truth.ground)
      assert changed <= 1


def test_drawings_that_are_no_scenes_have_none(records):
  assert near_misses.near_misses(OpenMoji()[0], 3) == []
  assert near_misses.near_misses(dataclasses.replace(records[0], truth=None), 3) == []


def test_the_pipeline_hands_them_over():
  config = DataConfig(examples=40, near_misses=2)
  data = small_pipeline(config, names=('near', 'near_length'))
  batch = data.examples(range(40)).inputs
  assert batch['near'].shape == (40, 2, 32) and batch['near_length'].shape == (40, 2)
  for i in range(40):
    captions = near_misses.near_misses(data.record(i), 2)
    assert (batch['near_length'][i] > 0).sum() == len(captions)
    for ids, length, caption in zip(batch['near'][i], batch['near_length'][i], captions):
      wanted, count = data.preprocess.tokenizer.encode_batch([caption], 32)
      np.testing.assert_array_equal(ids, wanted[0])
      assert length == count[0]
