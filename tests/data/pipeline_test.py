"""The stream: its order does not depend on hosts, processes or the step of a resume."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.small_pipelines import IMAGES, TEXT, small_pipeline
from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data import cache
from vpe_jax.data.embedded.synthetic import SyntheticEncoded
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.preprocess import PromptAndImage
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
  (batch,) = _take(small_pipeline(_CONFIG), 1, 0, 4)
  assert (batch.example.shape, batch.example.dtype) == ((4,), np.int32)
  assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.inputs.items()} == {
    'text': ((4, 32), np.int32),
    'text_length': ((4,), np.int32),
    'image': ((4, 16, 16, 3), np.uint8),
  }
  assert not batch.encoded


def test_examples_are_the_records_of_their_positions():
  pipeline = small_pipeline(_CONFIG, 3)
  for batch in _take(pipeline, 4, 18, 4):  # across the end of an epoch
    for element, position in enumerate(batch.example):
      record = pipeline.record(pipeline.index_at(int(position)))
      np.testing.assert_array_equal(batch.inputs['image'][element], render(record, 16))
      tokens = batch.inputs['text'][element][: batch.inputs['text_length'][element]]
      assert bpe.shipped().encode(record.caption) == tokens.tolist()


def test_epochs_are_different_shuffles_of_everything():
  pipeline = small_pipeline(_SYNTHETIC, 0)
  epochs = [[pipeline.index_at(22 * e + i) for i in range(22)] for e in range(3)]
  assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 3
  reseeded = small_pipeline(_SYNTHETIC, 1)
  assert [reseeded.index_at(i) for i in range(22)] != epochs[0]


def test_resuming_anywhere_gives_the_same_stream():
  whole = _take(small_pipeline(_SYNTHETIC, 7), 12, 0, 6)
  for start in (1, 3, 8):
    _same(_take(small_pipeline(_SYNTHETIC, 7), 12 - start, 6 * start, 6), whole[start:])
  other_size = _take(small_pipeline(_SYNTHETIC, 7), 2, 30, 4)
  np.testing.assert_array_equal(other_size[0].example, whole[5].example[:4])
  images = [batch.inputs['image'][:4] for batch in (other_size[0], whole[5])]
  np.testing.assert_array_equal(*images)


@pytest.mark.parametrize('hosts', [2, 4])
def test_parts_of_a_batch_are_contiguous(hosts):
  whole = _take(small_pipeline(_SYNTHETIC, 7), 5, 8, 8)
  parts = [_take(small_pipeline(_SYNTHETIC, 7), 5, 8, 8, h, hosts) for h in range(hosts)]
  for number, batch in enumerate(whole):
    slices = [part[number] for part in parts]
    _same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *slices), batch)


@dataclasses.dataclass(frozen=True)
class _Noisy(PromptAndImage):
  """Preprocessing with a random input."""

  def __call__(self, record, names, rng):
    return super().__call__(record, names, rng) | {'noise': rng.standard_normal(3)}


def _noisy(config):
  return _Noisy(bpe.shipped(), config)


def test_reader_processes_change_nothing():
  open_pipeline = lambda workers: Pipeline(
    dataclasses.replace(_CONFIG, workers=workers), 7, _noisy(_CONFIG), (*IMAGES, 'noise')
  )
  _same(_take(open_pipeline(2), 6, 4, 8), _take(open_pipeline(0), 6, 4, 8))


def test_encoded_entries_from_a_cache(monkeypatch, tmp_path):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path))
  entries = SyntheticEncoded(22, (('codes', (9,), 32), ('latents', (4, 4, 2), 0)))
  batches = [{name: leaf[None] for name, leaf in entries[i].items()} for i in range(22)]
  stored = cache.write_cache('x', lambda start: batches, shard=8)
  pipeline = small_pipeline(_SYNTHETIC, 7, TEXT, encoded=stored)
  (batch,) = _take(pipeline, 1, 5, 4)
  assert batch.inputs.keys() == set(TEXT)
  assert {name: leaf.shape for name, leaf in batch.encoded.items()} == {
    'codes': (4, 9),
    'latents': (4, 4, 4, 2),
  }
  for element, position in enumerate(batch.example):
    for name, leaf in entries[pipeline.index_at(int(position))].items():
      np.testing.assert_array_equal(batch.encoded[name][element], leaf)
  _same(_take(small_pipeline(_SYNTHETIC, 7, TEXT, encoded=entries), 1, 5, 4), [batch])


def test_source_images_of_edits_are_inputs():
  config = DataConfig(source='edits', examples=12, image_size=16, source_images=True)
  pipeline = small_pipeline(config, 0, ('image', 'source_image'))
  (batch,) = _take(pipeline, 1, 4, 4)
  images, sources = batch.inputs['image'], batch.inputs['source_image']
  for element, position in enumerate(batch.example):
    record = pipeline.record(pipeline.index_at(int(position)))
    np.testing.assert_array_equal(images[element], render(record, 16))
    np.testing.assert_array_equal(sources[element], record.reference.render(16))
    assert (images[element] != sources[element]).any()


def test_preprocessing_is_keyed_by_seed_and_position():
  open_pipeline = lambda seed: Pipeline(_SYNTHETIC, seed, _noisy(_SYNTHETIC), ('noise',))
  whole = _take(open_pipeline(7), 4, 0, 6)
  noise = np.concatenate([batch.inputs['noise'] for batch in whole])
  assert len(np.unique(noise, axis=0)) == 24  # of 22 records, so epochs differ too
  _same(_take(open_pipeline(7), 3, 6, 6), whole[1:])
  (reseeded,) = _take(open_pipeline(8), 1, 0, 6)
  assert (reseeded.inputs['noise'] != whole[0].inputs['noise']).all()


def test_selected_examples():
  pipeline = small_pipeline(_CONFIG)
  batch = pipeline.examples([5, 2, 5])
  images = batch.inputs['image']
  assert batch.example.tolist() == [5, 2, 5]
  np.testing.assert_array_equal(images[1], render(pipeline.record(2), 16))
  np.testing.assert_array_equal(images[0], images[2])


def test_held_out_stream():
  pipeline = small_pipeline(dataclasses.replace(_CONFIG, examples=30), split='combination')
  assert {pipeline.record(i).split for i in range(len(pipeline))} == {'combination'}


def test_mistakes_are_named(monkeypatch):
  monkeypatch.setattr('os.cpu_count', lambda: 8)
  with pytest.raises(UserError, match='6 .* 4 parts'):
    small_pipeline(_SYNTHETIC, 0).batches(0, 6, 0, 4)
  with pytest.raises(UserError, match='cache holds 21 records'):
    small_pipeline(_SYNTHETIC, 0, encoded=SyntheticEncoded(21, ()))
  with pytest.raises(UserError, match='data.workers is 33'):
    small_pipeline(dataclasses.replace(_CONFIG, workers=33), 7).batches(0, 4)


def test_long_captions_are_truncated():
  short = small_pipeline(dataclasses.replace(_CONFIG, text_length=2)).examples([0]).inputs
  whole = small_pipeline(_CONFIG).examples([0]).inputs
  assert whole['text_length'][0] > 2
  np.testing.assert_array_equal(short['text_length'], [2])
  np.testing.assert_array_equal(short['text'], whole['text'][:, :2])


def test_class_names_may_be_the_prompts():
  names = 'smileys,people,animals,food,travel,activities,objects,symbols,flags'
  config = DataConfig(
    source='openmoji',
    examples=12,
    image_size=8,
    text_length=1,
    prompt_field='group',
    tokenizer=f'classes:{names}',
  )
  pipeline = small_pipeline(config, 0)
  batch = pipeline.examples(range(12)).inputs
  groups = [pipeline.record(index).group for index in range(12)]
  assert [names.split(',')[ids[0]] for ids in batch['text']] == groups
  assert (batch['text_length'] == 1).all() and len(set(groups)) > 2
  assert [pipeline.prompt(index) for index in range(12)] == groups
  config = dataclasses.replace(config, prompt_field='caption', tokenizer='assets:bpe')
  captions = small_pipeline(config)
  assert captions.prompt(3) == captions.record(3).caption != groups[3]


def _own_images(folder, count=12, captions=lambda number: f'image {number}', **fields):
  """The config of a folder of images, each of its own grey level."""
  lines = []
  for number in range(count):
    Image.new('RGB', (8, 8), (number * 10,) * 3).save(folder / f'{number:02d}.png')
    lines.append(json.dumps({'file': f'{number:02d}.png', 'caption': captions(number)}))
  (folder / 'captions.jsonl').write_text('\n'.join(lines))
  return DataConfig(source=f'folder:{folder}', image_size=8, text_length=8, **fields)


def test_an_image_that_becomes_unreadable_is_replaced_deterministically(tmp_path, caplog):
  """Hosts, reader processes and resumed runs agree on the replacement."""
  config = _own_images(tmp_path, most_skipped=0.1)
  pipelines = [small_pipeline(config, 7) for _ in range(2)]
  reading_in_processes = small_pipeline(dataclasses.replace(config, workers=2), 7)
  intact = _take(pipelines[0], 4, 0, 6)
  (tmp_path / '05.png').write_bytes(b'none')
  whole = _take(pipelines[0], 4, 0, 6)
  levels = lambda batches: [image.max() for b in batches for image in b.inputs['image']]
  replaced = [old != new for old, new in zip(levels(intact), levels(whole), strict=True)]
  assert [level for level, new in zip(levels(intact), replaced, strict=True) if new] == [50, 50]
  assert len({level for level, new in zip(levels(whole), replaced, strict=True) if new}) == 1
  (warning,) = [record.getMessage() for record in caplog.records]
  assert '05.png' in warning
  _same(_take(pipelines[1], 2, 12, 6), whole[2:])
  _same(_take(reading_in_processes, 4, 0, 6), whole)
  parts = [_take(pipelines[1], 4, 0, 6, host, 2) for host in range(2)]
  _same([jax.tree.map(lambda *x: np.concatenate(x), *two) for two in zip(*parts)], whole)
  (tmp_path / '06.png').unlink()
  with pytest.raises(UserError, match='2 of 12 records.*data.most_skipped=0.1.*0[56].png'):
    _take(pipelines[0], 4, 0, 6)
  with pytest.raises(UserError, match='05.png'):
    pipelines[0].examples([5])  # Nothing else may be stored in a cache in its place.


def test_one_of_several_captions_is_drawn_for_each_example_and_epoch(tmp_path):
  config = _own_images(tmp_path, captions=lambda n: [f'a {n}', f'b {n}', f'c {n}'][: 1 + n % 3])
  pipeline = small_pipeline(config, 3)
  drawn = {}
  for position in range(48):
    caption = pipeline.prompt_at(position)
    drawn.setdefault(pipeline.index_at(position), []).append(caption)
  for number, captions in drawn.items():
    assert {caption[0] for caption in captions} <= set('abc'[: 1 + number % 3])
    assert {caption[2:] for caption in captions} == {str(number)}
  assert len({captions[0] for captions in map(tuple, drawn.values())} & {'a 0', 'a 3', 'a 6'}) == 3
  assert any(len(set(captions)) > 1 for captions in drawn.values())  # Epochs differ.
  assert [pipeline.prompt(index) for index in range(3)] == ['a 0', 'a 1', 'a 2']
  for batch in _take(small_pipeline(config, 3), 3, 20, 6):
    for element, position in enumerate(batch.example):
      tokens = batch.inputs['text'][element][: batch.inputs['text_length'][element]]
      assert bpe.shipped().encode(pipeline.prompt_at(int(position)))[:8] == tokens.tolist()
  reseeded = small_pipeline(config, 4)
  at = {reseeded.index_at(p): reseeded.prompt_at(p) for p in range(12)}
  assert any(at[number] != captions[0] for number, captions in drawn.items())
