"""The stream: one order whatever the hosts, processes, and place of resumption."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data import cache
from vpe_jax.data.embedded.synthetic import SyntheticCodes
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.records import render
from vpe_jax.data.tokenizers import bpe

_CONFIG = DataConfig(examples=22, image_size=16)
_SYNTHETIC = DataConfig(source='synthetic', examples=22, image_size=8)


def _take(pipeline, count, start, batch_size, host_index=0, host_count=1):
  with pipeline.batches(start, batch_size, host_index, host_count) as batches:
    return [next(batches) for _ in range(count)]


def _same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_batch_structure():
  (batch,) = _take(Pipeline(_CONFIG, 0), 1, 0, 4)
  shapes = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
  assert shapes.pop('codes') is None and shapes.pop('latents') is None
  assert shapes.pop('near') is None and shapes.pop('near_length') is None
  assert shapes.pop('reference') is None and shapes.pop('reference_latents') is None
  assert {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} == {
    'example': ((4,), np.int32),
    'text': ((4, 32), np.int32),
    'text_length': ((4,), np.int32),
    'image': ((4, 16, 16, 3), np.uint8),
  }


def test_rows_are_the_records_of_their_places():
  pipeline = Pipeline(_CONFIG, 3)
  for batch in _take(pipeline, 4, 18, 4):  # across the end of an epoch
    for row, place in enumerate(batch.example):
      record = pipeline.record(pipeline.index_at(int(place)))
      np.testing.assert_array_equal(batch.image[row], render(record, 16))
      words = batch.text[row][: batch.text_length[row]]
      assert bpe.shipped().encode(record.caption) == words.tolist()


def test_epochs_are_different_shuffles_of_everything():
  pipeline = Pipeline(_SYNTHETIC, 0)
  epochs = [[pipeline.index_at(22 * e + i) for i in range(22)] for e in range(3)]
  assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  other = Pipeline(_SYNTHETIC, 1)
  assert [other.index_at(i) for i in range(22)] != epochs[0]


def test_resuming_anywhere_gives_the_same_stream():
  whole = _take(Pipeline(_SYNTHETIC, 7), 12, 0, 6)
  for start in (1, 3, 8):
    _same(_take(Pipeline(_SYNTHETIC, 7), 12 - start, 6 * start, 6), whole[start:])
  other_size = _take(Pipeline(_SYNTHETIC, 7), 2, 30, 4)
  np.testing.assert_array_equal(other_size[0].image[:4], whole[5].image[:4])


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_take_contiguous_rows(hosts):
  whole = _take(Pipeline(_SYNTHETIC, 7), 5, 8, 8)
  parts = [_take(Pipeline(_SYNTHETIC, 7), 5, 8, 8, h, hosts) for h in range(hosts)]
  for number, batch in enumerate(whole):
    rows = [part[number] for part in parts]
    _same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows), batch)


def test_reader_processes_change_nothing():
  whole = _take(Pipeline(_CONFIG, 7), 6, 4, 8)
  with_processes = Pipeline(dataclasses.replace(_CONFIG, workers=2), 7)
  _same(_take(with_processes, 6, 4, 8), whole)


def test_far_more_reader_processes_than_cores_are_refused(monkeypatch):
  monkeypatch.setattr('os.cpu_count', lambda: 8)
  many = Pipeline(dataclasses.replace(_CONFIG, workers=33), 7)
  with pytest.raises(UserError, match='data.workers is 33, .* 8 CPU core.*at most 32'):
    many.batches(0, 4)


def test_codes_and_latents_from_a_cache(monkeypatch, tmp_path):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path))
  made = SyntheticCodes(22, patches=9, codebook=32, latent_shape=(4, 4, 2))
  stored = cache.write_cache('x', [tuple(a[None] for a in made[i]) for i in range(22)], shard=8)
  pipeline = Pipeline(_SYNTHETIC, 7, encoded=stored)
  (batch,) = _take(pipeline, 1, 5, 4)
  assert batch.image is None
  assert batch.codes.shape == (4, 9) and batch.latents.shape == (4, 4, 4, 2)
  for row, place in enumerate(batch.example):
    codes, latents = made[pipeline.index_at(int(place))]
    np.testing.assert_array_equal(batch.codes[row], codes)
    np.testing.assert_array_equal(batch.latents[row], latents)
  _same(_take(Pipeline(_SYNTHETIC, 7, encoded=made), 1, 5, 4), [batch])


def test_pictures_before_an_edit_come_beside_the_others(monkeypatch, tmp_path):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path))
  config = DataConfig(source='edits', examples=12, image_size=16, references=True)
  pipeline = Pipeline(config, 0)
  (batch,) = _take(pipeline, 1, 4, 4)
  for row, place in enumerate(batch.example):
    record = pipeline.record(pipeline.index_at(int(place)))
    np.testing.assert_array_equal(batch.image[row], render(record, 16))
    np.testing.assert_array_equal(batch.reference[row], record.reference.draw(16))
    assert (batch.image[row] != batch.reference[row]).any()
  made = SyntheticCodes(12, patches=9, codebook=32, latent_shape=(4, 4, 2), references=True)
  stored = cache.write_cache('x', [tuple(a[None] for a in made[i]) for i in range(12)], shard=8)
  for encoded in (made, stored):
    (batch,) = _take(Pipeline(config, 0, encoded=encoded), 1, 4, 4)
    assert batch.reference is None and batch.image is None
    before = [made[pipeline.index_at(int(place))][2] for place in batch.example]
    np.testing.assert_array_equal(batch.reference_latents, before)
    assert (batch.reference_latents != batch.latents).any()


def test_fixed_examples():
  pipeline = Pipeline(_CONFIG, 0)
  batch = pipeline.examples([5, 2, 5])
  assert batch.example.tolist() == [5, 2, 5]
  np.testing.assert_array_equal(batch.image[1], render(pipeline.record(2), 16))
  np.testing.assert_array_equal(batch.image[0], batch.image[2])


def test_held_out_stream():
  pipeline = Pipeline(dataclasses.replace(_CONFIG, examples=30), 0, 'combination')
  assert {pipeline.record(i).split for i in range(len(pipeline))} == {'combination'}


def test_mistakes():
  with pytest.raises(UserError, match='6 does not divide over 4 hosts'):
    Pipeline(_SYNTHETIC, 0).batches(0, 6, 0, 4)
  with pytest.raises(UserError, match='holds 21 records and the source 22'):
    Pipeline(_SYNTHETIC, 0, encoded=SyntheticCodes(21, 9, 32, (4, 4, 2)))


def test_long_captions_are_cut():
  short = Pipeline(dataclasses.replace(_CONFIG, text_length=2), 0).examples([0])
  whole = Pipeline(_CONFIG, 0).examples([0])
  assert whole.text_length[0] > 2
  np.testing.assert_array_equal(short.text_length, [2])
  np.testing.assert_array_equal(short.text, whole.text[:, :2])


def test_a_class_is_what_a_picture_is_drawn_from():
  names = 'smileys,people,animals,food,travel,activities,objects,symbols,flags'
  config = DataConfig(
    source='openmoji',
    examples=12,
    image_size=8,
    text_length=1,
    words='group',
    tokenizer=f'classes:{names}',
  )
  pipeline = Pipeline(config, 0)
  batch = pipeline.examples(range(12))
  groups = [pipeline.record(index).group for index in range(12)]
  assert [names.split(',')[ids[0]] for ids in batch.text] == groups
  assert (batch.text_length == 1).all() and len(set(groups)) > 2
  assert [pipeline.said(index) for index in range(12)] == groups
  captions = Pipeline(dataclasses.replace(config, words='caption', tokenizer='assets:bpe'), 0)
  assert captions.said(3) == captions.record(3).caption != groups[3]
