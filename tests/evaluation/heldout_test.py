"""Tests of held-out losses."""

import jax
import numpy as np
import pytest

from vpe_jax import rng, sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.training.heldout import BATCHES, SPLIT, HeldOut
from vpe_jax.training.state import first_state


def _evaluate(system, index, times=1, change=lambda state: state):
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    held_out = HeldOut(system.config, system, frozen_lib.load(system, mesh, 'fsdp'), mesh)
    state = first_state(system.init(jax.random.key(0)), system.stages[index])
    state = change(state | {'stage': np.int32(index)})
    return [held_out.evaluate(state, rng.run_key(0)) for _ in range(times)][-1]


@pytest.fixture
def uncached(line_system, frozen):
  """A system on scenes that reads images alone."""
  data = {'source': 'scenes', 'examples': 70, 'image_size': 8, 'text_length': 32}
  system = line_system(data=data)
  system.frozen = frozen
  return system


def test_losses_of_all_stages_on_the_same_held_out_examples(uncached):
  system = uncached
  first = _evaluate(system, 0)
  assert first.keys() == {'eval/tokens', 'eval/noise', 'eval/watched'}
  assert first == _evaluate(system, 0, times=2)
  # By hand, over all batches at once.
  with Pipeline.of(system, SPLIT).batches(0, 8 * BATCHES) as batches:
    batch = next(batches)
  params = system.init(jax.random.key(0))
  rest = (system.networks(), batch, rng.run_key(0), np.int32(0), system.stages[1])
  for name, term in system.losses(params, *rest).items():
    np.testing.assert_allclose(first[f'eval/{name}'], term.sum / term.count, rtol=1e-5)


def test_averaged_parameters_are_what_is_evaluated(uncached):
  halved = lambda tree: jax.tree.map(lambda leaf: leaf / 2, tree)
  average = lambda state: state | {'ema': halved(state['params'])}
  alone = lambda state: state | {'params': halved(state['params']), 'ema': {}}
  found = _evaluate(uncached, 1, change=average)
  assert found == _evaluate(uncached, 1, change=alone) and found != _evaluate(uncached, 1)


def test_images_are_encoded_once(drawing_system):
  class Reader(type(drawing_system())):
    """Its batches come without images."""

    def losses(self, params, frozen, batch, *rest):
      assert batch.inputs.keys() == {'text', 'text_length'}
      assert batch.encoded.keys() == {'visual_prompt', 'latents'}
      return super().losses(params, frozen, batch, *rest)

  for mode in ('cached', 'online'):
    plain = drawing_system(data={'encode': mode})
    system = Reader(plain.config, plain.frozen)
    assert _evaluate(system, 1, times=3).keys() == {'eval/tokens', 'eval/noise', 'eval/watched'}
    assert system.encodings == 1


def test_a_source_without_a_split_says_so(line_system, frozen, capsys):
  system = line_system(log={'evaluate': 5})
  system.frozen = frozen
  assert _evaluate(system, 0) == {}
  assert 'synthetic has no held-out split' in capsys.readouterr().out
