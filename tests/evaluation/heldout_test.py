"""Tests of held-out losses."""

import jax
import numpy as np

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


def test_losses_of_all_stages_on_the_same_held_out_examples(drawing_system, monkeypatch):
  system = drawing_system()
  monkeypatch.delattr(type(system), 'encode')
  first = _evaluate(system, 0)
  assert first.keys() == {'eval/tokens', 'eval/noise', 'eval/watched'}
  assert first == _evaluate(system, 0, times=2)
  # By hand, over all batches at once.
  data = Pipeline(system.config.data, system.config.seed, split=SPLIT)
  with data.batches(0, 8 * BATCHES) as batches:
    batch = next(batches)
  params = system.init(jax.random.key(0))
  terms = system.losses(
    params, system.frozen(), batch, rng.run_key(0), np.int32(0), system.stages[1]
  )
  for name, term in terms.items():
    np.testing.assert_allclose(first[f'eval/{name}'], term.sum / term.count, rtol=1e-5)


def test_averaged_parameters_are_what_is_evaluated(drawing_system, monkeypatch):
  system = drawing_system()
  monkeypatch.delattr(type(system), 'encode')
  halved = lambda tree: jax.tree.map(lambda leaf: leaf / 2, tree)
  average = lambda state: state | {'ema': halved(state['params'])}
  alone = lambda state: state | {'params': halved(state['params']), 'ema': {}}
  found = _evaluate(system, 1, change=average)
  assert found == _evaluate(system, 1, change=alone) and found != _evaluate(system, 1)


def test_pictures_are_encoded_once(drawing_system):
  class Reader(type(drawing_system())):
    """Its losses need codes."""

    def losses(self, params, frozen, batch, *rest):
      assert batch.image is None
      image = np.zeros((batch.example.shape[0], 8, 8, 3), np.uint8)
      return super().losses(
        params, frozen, type(batch)(batch.example, batch.text, batch.text_length, image), *rest
      )

  plain = drawing_system(data={'encode': 'cached'})
  system = Reader(plain.config, plain.frozen_weights)
  _evaluate(system, 1, times=3)
  assert system.encoded == 1


def test_a_source_without_a_split_says_so(line_system, frozen_weights, capsys):
  system = line_system(log={'evaluate': 5})
  system.frozen_weights = frozen_weights
  assert _evaluate(system, 0) == {}
  assert 'synthetic has no held-out split' in capsys.readouterr().out
