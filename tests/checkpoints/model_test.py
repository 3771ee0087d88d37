"""Models are loaded shard by shard onto a mesh, in the dtype asked for, and sample there."""

from __future__ import annotations

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import t2i
from tests.small_systems import redrawn
from vpe_jax import sharding, systems
from vpe_jax.checkpoints import imports, store, weights
from vpe_jax.checkpoints import model as model_lib
from vpe_jax.compilation import examine
from vpe_jax.config import MeshConfig, to_dict
from vpe_jax.contracts import UserError
from vpe_jax.generator import Generator
from vpe_jax.sharding import leaves_by_path

DEVICES = 8
BF16 = np.dtype(jnp.bfloat16)


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope='module')
def config():
  config = t2i.get_config('debug')
  for part in (config.model.ar, config.model.dit, config.model.head):
    part.layers = 1
  config.model.dual_path.encoder.layers = 1
  return to_dict(systems.build(config.to_dict()).config)


@pytest.fixture(scope='module')
def sources(config, tmp_path_factory):
  """The same random parameters as a run and as a file, in float32."""
  folder = tmp_path_factory.mktemp('model')
  params = jax.device_get(redrawn(systems.build(config).init(jax.random.key(0)), 0.05))
  run, file = str(folder / 'run'), str(folder / 'all.safetensors')
  imports.write_checkpoint(run, params, config, stage=1, step=20)
  weights.save(file, params, {'config': json.dumps(config)}, 'float32')
  return {'run': run, 'file': file}


def _per_device(tree) -> int:
  """Bytes of a tree on one device."""
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('kind', ['run', 'file'])
def test_every_leaf_is_loaded_with_its_sharding_and_dtype(sources, mesh, kind):
  model = model_lib.load(sources[kind], dtype='bfloat16', mesh=mesh)
  expected = leaves_by_path(model_lib.abstract_params(model.system, mesh, 'bfloat16'))
  leaves, wide = leaves_by_path(model.params), leaves_by_path(weights.load(sources[kind])[0])
  assert model.system.config.dtype == 'bfloat16' and leaves.keys() == expected.keys()
  for path, leaf in leaves.items():
    assert leaf.dtype == BF16 and leaf.sharding.is_equivalent_to(
      expected[path].sharding, leaf.ndim
    ), path
    np.testing.assert_array_equal(np.asarray(leaf), wide[path].astype(BF16), err_msg=path)
  total = sum(leaf.nbytes for leaf in leaves.values())
  assert _per_device(model.params) < 1.1 * total / DEVICES


def test_a_run_is_never_whole_in_float32(sources, mesh, monkeypatch):
  """Each group of float32 leaves is sharded, and rounded before the next one is read."""
  limit, sizes, verified = 2**16, [], store.Store._load_verified

  def load(self, step, record, targets):
    leaves = verified(self, step, record, targets)
    sizes.append((_per_device(leaves), sum(leaf.nbytes for leaf in leaves.values())))
    return leaves

  monkeypatch.setattr(store, '_GROUP_BYTES', limit)
  monkeypatch.setattr(store.Store, '_load_verified', load)
  model = model_lib.load(sources['run'], dtype='bfloat16', mesh=mesh)
  largest = 4 * max(leaf.size for leaf in jax.tree.leaves(model.params))
  whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(model.params))
  assert len(sizes) > 5 and sum(total for _, total in sizes) == whole
  assert max(total for _, total in sizes) <= max(limit, largest) < whole / 2
  assert sum(part for part, _ in sizes) < 1.1 * whole / DEVICES


def test_a_file_is_never_whole_in_float32(sources, mesh):
  tracemalloc.start()
  try:
    model = model_lib.load(sources['file'], dtype='bfloat16', mesh=mesh)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  narrow = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
  # Devices of a CPU may use numpy's arrays; the file itself is mapped.
  assert peak < narrow + 2**21 and model.mesh.size == DEVICES


def test_sharded_generation_equals_that_of_one_device(sources, mesh):
  sharded = Generator.load(sources['run'], batch_size=8, dtype='float32', mesh=mesh)
  settings = sharded.settings(temperature=0.0, steps=2)
  assert _per_device(sharded.params) < 1.1 / DEVICES * sum(
    leaf.nbytes for leaf in jax.tree.leaves(sharded.params)
  )
  ours = sharded('a red fox', settings=settings)[0]
  expected = Generator.load(sources['run'], batch_size=8)('a red fox', settings=settings)[0]
  np.testing.assert_array_equal(ours.encoded['visual_prompt'], expected.encoded['visual_prompt'])
  np.testing.assert_allclose(
    ours.encoded['latents'], expected.encoded['latents'], rtol=1e-4, atol=1e-4
  )


def test_a_compiled_sampler_has_the_loaded_bytes(sources, config, mesh):
  request = examine.Request(f'cpu:{DEVICES}', program='sample', dtype='bfloat16', images_per_chip=1)
  lowered = examine.build(config, request).lowered
  model = model_lib.load(sources['run'], dtype='bfloat16', mesh=mesh)
  generator = Generator.of(model, batch_size=8)
  assert lowered.argument_bytes == _per_device(model.params) + _per_device(generator.frozen)


def test_small_models_take_one_device_and_wrong_dtypes_are_refused(sources):
  assert model_lib.load(sources['file']).mesh.size == 1
  with pytest.raises(UserError, match='--dtype=int4: choose one of float32, bfloat16'):
    model_lib.load(sources['file'], dtype='int4')
