"""Losses on held-out data."""

import dataclasses

import jax
import numpy as np
import pytest

from vpe_jax import rng, sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.evaluation.heldout import SPLIT, HeldOut


def _evaluate(system, index, times=1, held_out=None):
  mesh = sharding.make_mesh(system.config.mesh)
  frozen = frozen_lib.load(system, mesh, 'fsdp')
  params = system.init(jax.random.key(0))
  step, load = np.int32(0), lambda: frozen
  subject = Subject(system, params, index, mesh, stage_step=step, load_frozen=load)
  held_out = held_out or HeldOut()
  return [held_out.run(subject).numbers for _ in range(times)][-1]


@pytest.fixture
def uncached(line_system, frozen):
  """A system on scenes that reads only images."""
  data = {'source': 'scenes', 'examples': 70, 'image_size': 8, 'text_length': 32}
  system = line_system(data=data)
  system.frozen = frozen
  return system


def test_losses_of_all_stages_on_the_same_held_out_examples(uncached):
  system = uncached
  first = _evaluate(system, 0)
  assert first.keys() == {'eval/tokens', 'eval/noise', 'eval/watched'}
  assert first == _evaluate(system, 0, times=2)
  # The same losses over all batches at once.
  with Pipeline.of(system, SPLIT).batches(0, 8 * HeldOut().batches) as batches:
    batch = next(batches)
  params = system.init(jax.random.key(0))
  rest = (system.networks(), batch, rng.run_key(0), np.int32(0), system.stages[1])
  for name, term in system.losses(params, *rest).items():
    np.testing.assert_allclose(first[f'eval/{name}'], term.sum / term.count, rtol=1e-5)


def test_one_evaluator_serves_several_runs(uncached, line_system):
  other = line_system(seed=5, data=dataclasses.asdict(uncached.config.data))
  other.frozen, held_out = uncached.frozen, HeldOut()
  systems = (uncached, other, uncached)
  together = [_evaluate(system, 1, held_out=held_out) for system in systems]
  assert together == [_evaluate(system, 1) for system in systems]
  assert together[0] != together[1]


def test_activations_are_sharded_over_the_mesh_of_the_subject(line_system, uncached):
  class Sharded(type(uncached)):
    """A system that needs the mesh."""

    def losses(self, *args):
      assert jax.sharding.get_abstract_mesh().size == jax.device_count()
      return super().losses(*args)

  assert _evaluate(Sharded(uncached.config, uncached.frozen), 0)


def test_a_batch_size_that_does_not_divide_over_the_devices_is_rounded_up(uncached):
  uneven = dataclasses.replace(uncached.config, batch_size=(5, 5))
  assert _evaluate(type(uncached)(uneven, uncached.frozen), 0) == _evaluate(uncached, 0)


def test_images_are_encoded_once(drawing_system):
  class Reader(type(drawing_system())):
    """A system whose losses get encoded entries instead of images."""

    def losses(self, params, frozen, batch, *rest):
      assert batch.inputs.keys() == {'text', 'text_length'}
      assert batch.encoded.keys() == {'visual_prompt', 'latents'}
      return super().losses(params, frozen, batch, *rest)

  for mode in ('cached', 'online'):
    plain = drawing_system(data={'encode': mode})
    system = Reader(plain.config, plain.frozen)
    assert _evaluate(system, 1, times=3).keys() == {'eval/tokens', 'eval/noise', 'eval/watched'}
    assert system.encodings == 1


def test_a_source_without_held_out_split_has_no_losses(line_system, frozen):
  system = line_system()
  system.frozen = frozen
  mesh = sharding.make_mesh(system.config.mesh)
  report = HeldOut().run(Subject(system, {}, 0, mesh))
  assert report.numbers == {} and 'no held-out split' in report.lines[0]
  assert 'data.held_out' not in report.lines[0]  # It is for folders only.
