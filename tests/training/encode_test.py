"""Tests of encoding images before training, and of the cache of encoded entries."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import t2i
from tests.outcomes import refusal_of, result_of
from vpe_jax import sharding, systems
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.contracts import BatchSpec, UserError
from vpe_jax.data import cache
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.preparing import Settings, prepare
from vpe_jax.training import encode


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def open_data(drawing_system):
  """Opens the training data of a system: (pipeline, system)."""

  def make(frozen=None, **data):
    system = drawing_system(data={'encode': 'cached'} | data)
    return _open(system, frozen)[0], system

  return make


def _open(system, frozen=None):
  """The training data of a system, and its frozen networks."""
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    frozen = frozen or frozen_lib.load(system, mesh, 'fsdp')
    return encode.open_training_data(system.config, system, frozen, mesh), frozen


def _encode_zeros(params, inputs, rng, example):
  """An encode function with other weights, whose entries are all zero."""
  count = inputs['image'].shape[0]
  return {'visual_prompt': jnp.zeros((count, 4), jnp.int32), 'latents': jnp.zeros((count, 2, 2, 3))}


def _assert_encoded(batch, system, inputs):
  """Checks that a batch has the entries that `system` encodes from `inputs`."""
  expected = system.encode({}, inputs, None)
  assert batch.encoded.keys() == system.batch_spec(1).cacheable
  for name, leaf in batch.encoded.items():
    np.testing.assert_allclose(leaf, expected[name], rtol=1e-6)


def _folders(tmp_path):
  return sorted(path.name for path in (tmp_path / 'cache' / 'encoded').iterdir())


def test_cached_entries_equal_encoded_ones(open_data, capsys):
  data, system = open_data()
  online, _ = open_data(encode='online')
  assert '70/70' in capsys.readouterr().out
  for position in (0, 69):  # the last chunk is not full
    with data.batches(position, 8) as cached, online.batches(position, 8) as images:
      ours, theirs = next(cached), next(images)
    assert 'image' not in ours.inputs and not theirs.encoded
    _assert_encoded(ours, system, theirs.inputs)
    np.testing.assert_array_equal(ours.inputs['text'], theirs.inputs['text'])


def test_cache_is_reused_and_depends_on_data_and_encoders(open_data, tmp_path):
  _, first = open_data()
  _, again = open_data()
  assert first.encodings == 1 and again.encodings == 0
  assert [stored.source for stored in cache.list_caches()] == [first.config.data.source]
  open_data(examples=20)
  open_data(frozen=frozen_lib.FrozenNetworks({}, {'encoder': 'of other weights'}, _encode_zeros))
  assert len(_folders(tmp_path)) == 3


def test_damaged_cache_is_reported_and_rebuilt(open_data, tmp_path, capsys):
  open_data()
  shard = next((tmp_path / 'cache' / 'encoded').rglob('visual_prompt-*.npy'))
  content = bytearray(shard.read_bytes())
  content[-1] ^= 1
  shard.write_bytes(content)
  _, system = open_data()
  assert system.encodings == 1
  assert f'warning: cache file {shard} is damaged' in capsys.readouterr().out


def test_cache_invisible_to_other_hosts_is_an_error(open_data, monkeypatch):
  monkeypatch.setattr(cache, 'open_cache', lambda name: None)
  with pytest.raises(UserError, match='not visible to all hosts: set VPE_JAX_CACHE'):
    open_data()


def test_invalid_settings_are_one_line_errors(open_data, line_system, drawing_system):
  with pytest.raises(UserError, match="'data.encode' is 'before': it must be one of online"):
    open_data(encode='before')
  system = line_system()
  config = dataclasses.replace(
    system.config, data=dataclasses.replace(system.config.data, encode='cached')
  )
  with pytest.raises(UserError, match='line.* set data.encode=online'):
    encode.open_training_data(config, system, frozen_lib.FrozenNetworks({}, {}, None), None)


def test_changed_image_in_a_folder_changes_the_fingerprint(tmp_path, drawing_system):
  for name, value in (('a', 10), ('b', 20)):
    Image.new('RGB', (8, 8), (value,) * 3).save(tmp_path / f'{name}.png')
    (tmp_path / f'{name}.txt').write_text('a red fox')
  system = drawing_system(data={'source': f'folder:{tmp_path}', 'examples': 0})
  frozen = frozen_lib.FrozenNetworks({}, {}, None)

  def fingerprint():
    return encode.fingerprint(system.config.data, 0, frozen, Pipeline.of(system), {})

  before = fingerprint()
  assert fingerprint() == before
  Image.new('RGB', (8, 8), (99,) * 3).save(tmp_path / 'b.png')
  assert fingerprint() != before


@pytest.fixture
def breaking(tmp_path, drawing_system, monkeypatch, caplog):
  """Encodes a folder of 20 images: breaking(most_skipped) -> (pipeline, warnings that name 05.png).

  In the first call, 05.png breaks when the first chunk is encoded.
  """
  folder = tmp_path / 'images'
  folder.mkdir()
  for number in range(20):
    Image.new('RGB', (8, 8), (12 * number,) * 3).save(folder / f'{number:02d}.png')
    (folder / f'{number:02d}.txt').write_text(f'image {number}')
  encode_all = encode._encode_all

  def break_first(*arguments):
    if (folder / '05.png').read_bytes() != b'none':
      (folder / '05.png').write_bytes(b'none')
    return encode_all(*arguments)

  monkeypatch.setattr(encode, '_encode_all', break_first)
  data = {'source': f'folder:{folder}', 'examples': 0, 'encode': 'cached'}
  opened = Pipeline.of(drawing_system(data=data))  # checks the images

  def run(most_skipped):
    system = drawing_system(data=data | {'most_skipped': most_skipped})
    images = Pipeline.of(system, source=opened.source)
    mesh = sharding.make_mesh(system.config.mesh)
    with jax.set_mesh(mesh):
      frozen = frozen_lib.load(system, mesh, 'fsdp')
      return encode.open_training_data(system.config, system, frozen, mesh, images)

  def warnings():
    return [record.message for record in caplog.records if '05.png' in record.message]

  return run, warnings


def test_an_image_that_breaks_while_it_is_encoded_is_skipped_and_named_once(breaking):
  run, warnings = breaking
  data = result_of(run, 0.05)
  with data.batches(0, 20) as batches:
    cached = [next(batches) for _ in range(2)]
  assert len(warnings()) == 1 and 'a record is skipped' in warnings()[0]
  images = {}
  for batch in cached:
    for text, codes in zip(batch.inputs['text'], batch.encoded['visual_prompt'], strict=True):
      images[text.tobytes()] = codes
  assert len(images) == 19
  for index in set(range(20)) - {5}:
    text = data.preprocess(data.record(index), ('text',), None)['text']
    expected = round(12 * index / 255 * 10)
    np.testing.assert_array_equal(images[text.tobytes()], expected)
  for calls in (2, 3):  # The changed file gives another cache, which the last call reads.
    result_of(run, 0.05)
    assert len(warnings()) == calls


def test_more_images_that_break_while_encoded_than_allowed_end_the_run(breaking):
  run, _ = breaking
  message = '1 of 20 records can not be read, more than data.most_skipped=0; the last: .*05.png'
  assert re.search(message, refusal_of(run, 0.0))


def test_repeated_folder_of_a_recipe_is_encoded_once(open_data, tmp_path, capsys):
  for name, values in (('warm', (10, 20)), ('cold', (30, 40, 50))):
    (tmp_path / name).mkdir()
    for value in values:
      Image.new('RGB', (8, 8), (value,) * 3).save(tmp_path / name / f'{value}.png')
      (tmp_path / name / f'{value}.txt').write_text('a red fox')
  recipe = {'source': 'folders:warm*3,cold*2', 'root': str(tmp_path), 'examples': 0}
  cached, system = open_data(**recipe)
  assert '5/5' in capsys.readouterr().out
  online, _ = open_data(encode='online', **recipe)
  with cached.batches(0, 12) as cached_batches, online.batches(0, 12) as image_batches:
    batch, images = next(cached_batches), next(image_batches)
  _assert_encoded(batch, system, images.inputs)
  assert len(np.unique(batch.encoded['latents'].mean((1, 2, 3)).round(4))) == 5
  open_data(**recipe | {'source': 'folders:warm,cold'})
  assert len(_folders(tmp_path)) == 1  # The same images, whatever their repetition.


def test_a_filter_of_records_changes_the_fingerprint(tmp_path, drawing_system):
  """Filters may leave out records that are not among those whose images are compared."""
  (tmp_path / 'images').mkdir()
  Image.new('RGB', (8, 8)).save(tmp_path / 'images' / 'a.png')
  (tmp_path / 'images' / 'a.txt').write_text('a red fox')
  frozen = frozen_lib.FrozenNetworks({}, {}, None)

  def fingerprint(**changes):
    data = {'source': f'folder:{tmp_path}/images', 'examples': 0}
    system = drawing_system(data=data)
    changed = dataclasses.replace(system.config.data, **changes)
    return encode.fingerprint(changed, 0, frozen, Pipeline.of(system), {})

  changes = ({'held_out': 0.1}, {'filters': {'a': {'language': 'en'}}}, {'language': 'en'})
  names = [fingerprint(**change) for change in ({}, *changes)]
  assert len(set(names)) == len(names) and 'selection' not in names[0]


def test_prepared_folder_is_identified_by_its_manifest(tmp_path, drawing_system):
  """File dates don't count, so a copy of the folder is the same data."""
  (tmp_path / 'in').mkdir()
  for name, value in (('a', 10), ('b', 20)):
    Image.new('RGB', (8, 8), (value,) * 3).save(tmp_path / 'in' / f'{name}.png')
    (tmp_path / 'in' / f'{name}.txt').write_text('a red fox')
  prepare(Settings(f'folder:{tmp_path}/in'), str(tmp_path / 'to'))
  system = drawing_system(data={'source': f'folder:{tmp_path}/to', 'examples': 0})
  frozen = frozen_lib.FrozenNetworks({}, {}, None)

  def fingerprint():
    return encode.fingerprint(system.config.data, 0, frozen, Pipeline.of(system), {})

  before = fingerprint()
  (shard,) = (tmp_path / 'to').glob('*.array_record')
  os.utime(shard, (1, 1))
  assert fingerprint() == before
  manifest = json.loads((tmp_path / 'to' / 'prepared.json').read_text())
  manifest['shards'][0]['crc32'] ^= 1
  (tmp_path / 'to' / 'prepared.json').write_text(json.dumps(manifest))
  assert fingerprint() != before


def test_source_images_are_encoded_too(tmp_path, drawing_system):
  class Editing(type(drawing_system())):
    """A system that also reads source images."""

    def batch_spec(self, batch_size):
      spec = super().batch_spec(batch_size)
      source = {'source_image': spec.encoder_inputs['image']}
      encoded = {**spec.encoded, 'source_latents': spec.encoded['latents']}
      inputs = {**spec.encoder_inputs, **source}
      return BatchSpec(spec.inputs, inputs, encoded, frozenset(encoded), spec.codebooks)

    def encode(self, frozen, inputs, keys):
      source = super().encode(frozen, {'image': inputs['source_image']}, keys)['latents']
      return super().encode(frozen, inputs, keys) | {'source_latents': source}

  data = {'encode': 'cached', 'source': 'edits', 'examples': 9, 'source_images': True}
  plain = drawing_system(data=data)
  system = Editing(plain.config, plain.frozen)
  images = Pipeline.of(system)
  cached, frozen = _open(system)
  with cached.batches(0, 8) as ours, images.batches(0, 8) as theirs:
    batch, uncached = next(ours), next(theirs)
  assert batch.inputs.keys() == {'text', 'text_length'}
  _assert_encoded(batch, system, uncached.inputs)
  assert (batch.encoded['latents'] != batch.encoded['source_latents']).any()
  references_field = '"references": true'
  assert references_field in encode.fingerprint(system.config.data, 0, frozen, images, {})
  without_sources = drawing_system(data={'encode': 'cached'})
  images = Pipeline.of(without_sources)
  data = without_sources.config.data
  assert references_field not in encode.fingerprint(data, 0, frozen, images, {})


def test_entries_that_are_not_cacheable_are_computed_online(drawing_system):
  class PartlyCacheable(type(drawing_system())):
    """A system whose latents depend on more than the example."""

    def batch_spec(self, batch_size):
      spec = super().batch_spec(batch_size)
      return dataclasses.replace(spec, cacheable=frozenset(['visual_prompt']))

  plain = drawing_system(data={'encode': 'cached'})
  system = PartlyCacheable(plain.config, plain.frozen)
  cached, _ = _open(system)
  with cached.batches(0, 8) as batches:
    batch = next(batches)
  assert batch.inputs.keys() == {'text', 'text_length', 'image'}
  _assert_encoded(batch, system, batch.inputs)
  # A cache with fewer entries is not reused.
  with _open(plain)[0].batches(0, 8) as batches:
    _assert_encoded(next(batches), plain, batch.inputs)


def test_encoder_settings_change_the_fingerprint():
  config = t2i.get_config('debug')
  settings = lambda: systems.build(config.to_dict()).encoder_settings
  before = settings()
  assert settings() == before
  config.model.image = {'weights': 'elsewhere.safetensors'}
  assert settings() == before
  config.dtype = 'bfloat16'
  in_bfloat16 = settings()
  assert in_bfloat16 != before and in_bfloat16['image'] == before['image']
  json.dumps(in_bfloat16)
