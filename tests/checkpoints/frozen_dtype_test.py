"""Tests of frozen networks in bfloat16: no step holds their weights in another dtype."""

from __future__ import annotations

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import t2i
from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import conversion, families, frozen, imports, sources, weights
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.compilation import program
from vpe_jax.config import CheckpointConfig, MeshConfig, to_dict
from vpe_jax.contracts import Batch, FrozenNetwork, PretrainedWeights, UserError
from vpe_jax.models.siglip import Siglip
from vpe_jax.sharding import leaves_by_path

BF16 = np.dtype(jnp.bfloat16)
LEAVES, SIZE = 8, 2**20  # of the files whose loading is measured


def _system(dtype: str):
  config = t2i.get_config('debug')
  config.data.encode = 'online'
  sections = {f'model.{name}': {'weights_dtype': dtype} for name in ('visual_prompt', 'image')}
  config.update_from_flattened_dict(sections)
  return systems.build(config.to_dict())


def _dtypes(tree) -> set:
  return {leaf.dtype for leaf in leaves_by_path(tree).values()}


def _bytes(tree) -> int:
  return sum(leaf.nbytes for leaf in leaves_by_path(tree).values())


def _peak(load) -> tuple[dict, int]:
  """The result of `load` and the peak of numpy's memory in bytes; mapped files don't count."""
  tracemalloc.start()
  try:
    tree = load()
    return tree, tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def _random(count: int, size: int) -> dict[str, np.ndarray]:
  generator = np.random.default_rng(0)
  return {f'leaf_{i}': generator.standard_normal(size, np.float32) for i in range(count)}


@pytest.fixture(scope='module')
def loaded():
  """Frozen networks of the shipped generator by dtype, on a mesh that shards them."""
  mesh = sharding.make_mesh(MeshConfig())
  return {name: frozen.load(_system(name), mesh, 'fsdp') for name in ('float32', 'bfloat16')}


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """Folder of a published SigLIP with float32 weights that bfloat16 can't represent."""
  folder = tmp_path_factory.mktemp('published') / 'siglip'
  conversion.export_weights('siglip', 'assets:siglip', str(folder))
  (file,) = folder.glob('*.safetensors')
  tensors = safetensors.numpy.load_file(file)
  generator = np.random.default_rng(0)
  for key, tensor in tensors.items():
    noise = generator.standard_normal(tensor.shape, np.float32)
    tensors[key] = np.asarray(tensor * (1 + 1e-3 * noise), np.float32)
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  return folder


def _rounded(folder) -> dict[str, np.ndarray]:
  """Parameters of a published SigLIP, rounded after they were loaded in float32."""
  params = families.load('siglip', sources.open_source(str(folder))).params
  return {path: np.asarray(leaf).astype(BF16) for path, leaf in leaves_by_path(params).items()}


def _assert_equal(tree, expected) -> None:
  leaves = leaves_by_path(tree)
  assert leaves.keys() == expected.keys()
  for path, leaf in leaves.items():
    assert leaf.dtype == expected[path].dtype, path
    np.testing.assert_array_equal(np.asarray(leaf), expected[path])


def test_shipped_networks_use_half_the_memory_and_encode_equally(loaded):
  narrow, wide = loaded['bfloat16'], loaded['float32']
  assert _dtypes(narrow.params) == {BF16} and _dtypes(wide.params) == {np.dtype(np.float32)}
  shard = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
  assert 2 * shard(narrow.params) == shard(wide.params)
  # The files are bfloat16 and the networks compute in float32, so nothing was rounded.
  images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
  codes, expected = (
    networks.encode_batch(Batch(np.arange(len(images)), {'image': images}), rng.run_key(0)).encoded
    for networks in (narrow, wide)
  )
  for name, leaf in expected.items():
    assert codes[name].dtype == leaf.dtype
    np.testing.assert_allclose(codes[name], leaf, rtol=1e-5, atol=1e-5)


def test_cached_encodings_depend_on_the_dtype(loaded):
  narrow, wide = loaded['bfloat16'].fingerprints, loaded['float32'].fingerprints
  assert narrow.keys() == wide.keys()
  assert all(narrow[name] != wide[name] for name in wide)


def test_compiled_programs_have_the_dtype():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  assert _dtypes(frozen.abstract_params(_system('bfloat16'))) == {BF16}
  narrow, wide = (
    program.lower(program.Job(_system(dtype), 0, program.TRAIN, 2, mesh))
    for dtype in ('bfloat16', 'float32')
  )
  assert 2 * narrow.frozen_bytes == wide.frozen_bytes > 0


@pytest.mark.parametrize('stored', ['published', 'float32', 'bfloat16'])
def test_published_weights_and_imports_are_rounded_once(published, tmp_path, stored):
  source = published
  if stored != 'published':
    source = tmp_path / 'imported'
    conversion.import_weights('siglip', str(published), str(source), dtype=stored)
    store = Store(str(source / FOLDER), CheckpointConfig())
    _, record = store.read(lambda paths: ())
    assert {leaf['dtype'] for leaf in record['leaves'].values()} == {stored}
    store.close()
  sizes = families.load('siglip', sources.open_source(str(published))).sizes
  start = PretrainedWeights('siglip', str(source), sizes)
  _assert_equal(imports.network(start, lambda tree: tree, 'bfloat16'), _rounded(published))


def test_outputs_of_rounded_weights_are_within_their_precision(published):
  source = sources.open_source(str(published))
  wide, narrow = (families.load('siglip', source, dtype=name) for name in ('float32', 'bfloat16'))
  sizes = wide.sizes
  images = np.random.default_rng(0).uniform(-1, 1, (2, sizes.image_size, sizes.image_size, 3))
  text = np.arange(2 * sizes.text_length).reshape(2, -1) % sizes.vocabulary
  forward = jax.jit(
    lambda params: Siglip(sizes).apply(
      {'params': params}, jnp.asarray(images, jnp.float32), jnp.asarray(text), jnp.array([5, 9])
    )
  )
  ours, expected = forward(narrow.params), forward(wide.params)
  assert ours.dtype == expected.dtype == np.float32
  error = np.max(np.abs(ours - expected)) / np.max(np.abs(expected))
  assert 1e-6 < error < 2e-2


@pytest.mark.parametrize('stored', ['float32', 'bfloat16'])
def test_file_is_never_in_memory_twice(tmp_path, stored):
  path = str(tmp_path / 'w.safetensors')
  weights.save(path, _random(LEAVES, SIZE), {}, stored)
  tree, peak = _peak(lambda: weights.load(path, 'bfloat16')[0])
  assert _dtypes(tree) == {BF16} and _bytes(tree) == LEAVES * SIZE * 2
  # The fingerprint is computed on parts of 2^20 elements in float32.
  assert peak < _bytes(tree) + 3 * 4 * 2**20


def test_run_is_rounded_in_groups(tmp_path, monkeypatch):
  params = _random(LEAVES, SIZE)
  state = {'stage': 0, 'step': 1, 'stage_step': 1, 'examples_seen': 1, 'params': params}
  store = Store(str(tmp_path / FOLDER), CheckpointConfig())
  store.save(state | {'opt_state': {}, 'ema': params}, {}, force=True)
  store.close()
  groups = []
  verified = Store._load_verified
  monkeypatch.setattr('vpe_jax.checkpoints.store._GROUP_BYTES', 2 * SIZE * 4)
  monkeypatch.setattr(
    Store, '_load_verified', lambda self, *args: groups.append(args[2]) or verified(self, *args)
  )
  tree, _ = weights.load(str(tmp_path), 'bfloat16')
  _assert_equal(tree, {path: leaf.astype(BF16) for path, leaf in params.items()})
  assert [len(group) for group in groups] == [2] * (LEAVES // 2)
  assert all(path.startswith('ema/') for group in groups for path in group)


def test_files_in_bfloat16_round_trip(tmp_path):
  first, second = (tmp_path / f'{name}.safetensors' for name in 'ab')
  weights.save(str(first), _random(2, 100) | {'count': np.arange(3)}, {'config': '{}'})
  tree, metadata = weights.load(str(first), 'bfloat16')
  assert _dtypes(tree) == {BF16, np.dtype(np.int64)}
  weights.save(str(second), tree, metadata)
  copy, copied_metadata = weights.load(str(second), 'bfloat16')
  _assert_equal(copy, leaves_by_path(tree))
  assert copied_metadata == metadata
  content = bytearray(first.read_bytes())
  content[-6] ^= 4
  first.write_bytes(content)
  with pytest.raises(UserError, match='a.safetensors.*damaged'):
    weights.load(str(first), 'bfloat16')


def test_unknown_dtypes_are_one_line_errors(published, tmp_path):
  path, out = str(tmp_path / 'w.safetensors'), str(tmp_path / 'out')
  weights.save(path, _random(1, 1), {})
  mesh = sharding.make_mesh(MeshConfig())
  for call in (
    lambda: frozen.load(_system('int4'), mesh, 'fsdp'),
    lambda: FrozenNetwork(path, dtype='int4'),
    lambda: weights.load(path, 'int4'),
    lambda: conversion.import_weights('siglip', str(published), out, dtype='int4'),
  ):
    with pytest.raises(UserError, match='int4.*choose') as error:
      call()
    assert '\n' not in str(error.value)
  assert not (tmp_path / 'out').exists()


def test_encoder_settings_exclude_weights_and_dtype():
  narrow, wide = _system('bfloat16'), _system('float32')
  assert to_dict(narrow.config.model) != to_dict(wide.config.model)
  assert narrow.encoder_settings == wide.encoder_settings
