"""Tests of the compiled step: freezing, accumulation, weights of 0, the guard, sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax import rng as randomness
from vpe_jax.contracts import COUNTERS, Stage
from vpe_jax.evaluation.heldout import make_eval_step
from vpe_jax.training import state as state_lib
from vpe_jax.training.step import make_train_step, microbatches

KEY = randomness.run_key(3)
HEAD, ALL = 0, 1


def _state(system, index=ALL):
  return state_lib.first_state(system.init(jax.random.key(0)), system.stages[index])


def _run(system, optim, index=ALL, steps=1, batch_size=8):
  step = make_train_step(system, system.stages[index], optim)
  state, history = _state(system, index), []
  for number in range(steps):
    batch = system.batch(batch_size, number * batch_size)
    state, metrics = step(state, system.networks(), batch, KEY)
    history.append(jax.device_get(metrics))
  return state, history


def _gap(first, second):
  """The largest difference of two trees, relative to the largest number of each leaf."""
  gaps = jax.tree.map(
    lambda a, b: float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(a)) + 1e-12)), first, second
  )
  return max(jax.tree.leaves(gaps))


def test_step_updates_counters_and_returns_metrics(line_system, optim):
  system = line_system()
  state, history = _run(system, optim(), steps=3)
  assert [int(state[name]) for name in COUNTERS] == [0, 3, 3, 24]
  last = history[-1]
  losses = {'loss', 'loss/tokens', 'loss/noise', 'loss/watched'}
  assert last.keys() == losses | {'weight/noise', 'grad_norm', 'lr', 'skipped'}
  np.testing.assert_allclose(last['weight/noise'], 0.3, rtol=1e-6)
  total = last['loss/tokens'] + last['weight/noise'] * last['loss/noise']
  np.testing.assert_allclose(last['loss'], total, rtol=1e-6)
  assert history[0]['loss/tokens'] > last['loss/tokens']


def test_frozen_leaves_stay_bitwise_and_take_no_weight_gradient(line_system, optim):
  system = line_system()
  before = jax.device_get(_state(system, HEAD)['params'])
  state, _ = _run(system, optim(), HEAD, steps=2)
  np.testing.assert_array_equal(state['params']['backbone']['kernel'], before['backbone']['kernel'])
  assert _gap(before['head'], jax.device_get(state['params']['head'])) > 0

  def weight_gradients(index):
    """Products in the compiled step whose result has the shape of the frozen kernel."""
    step = make_train_step(system, system.stages[index], optim())
    lowered = step.lower(_state(system, index), system.networks(), system.batch(8), KEY)
    return len(re.findall(r'= f32\[(?:16,24|24,16)\]\S* dot\(', lowered.compile().as_text()))

  assert weight_gradients(HEAD) == 0
  assert weight_gradients(ALL) == 1  # the expression matches a gradient that exists


@pytest.mark.parametrize('index', [HEAD, ALL])
def test_one_batch_of_8_equals_4_microbatches_of_2(line_system, optim, index):
  system = line_system()
  lengths = system.batch(8).inputs['text_length'].reshape(2, 4).sum(0)
  assert len(set(lengths.tolist())) > 1  # microbatches with uneven counts
  # Stateless rule: Adam would hide a wrong scale of the gradient.
  gradients = {}
  for accumulate in (1, 4):
    state, history = _run(system, optim(accumulate=accumulate, clip=0.0), index)
    gradients[accumulate] = (state['opt_state']['mu'], history[0], state['params'])
  assert _gap(gradients[1][0], gradients[4][0]) < 1e-6
  assert _gap(gradients[1][1], gradients[4][1]) < 1e-6
  assert _gap(gradients[1][2], gradients[4][2]) < 1e-6


def test_microbatches_are_strided():
  examples = jnp.arange(8)
  np.testing.assert_array_equal(microbatches(examples, 2), [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_weight_0_is_logged_and_changes_no_gradient(line_system, optim):
  class Loud(type(line_system())):
    """A system whose `watched` loss is 1,000 times as large."""

    def losses(self, *args):
      terms = super().losses(*args)
      terms['watched'] = jax.tree.map(lambda x: x, terms['watched'])
      louder = type(terms['watched'])(1000 * terms['watched'].sum, terms['watched'].count, 0.0)
      return terms | {'watched': louder}

  quiet, loud = line_system(), Loud(line_system().config)
  quiet_state, quiet_history = _run(quiet, optim())
  loud_state, loud_history = _run(loud, optim())
  assert loud_history[0]['loss/watched'] > 999 * quiet_history[0]['loss/watched'] > 0
  assert loud_history[0]['loss'] == quiet_history[0]['loss']
  assert _gap(quiet_state['params'], loud_state['params']) == 0


def test_non_finite_gradient_updates_nothing(line_system, optim):
  system = line_system()
  step = make_train_step(system, system.stages[ALL], optim())
  state, _ = step(_state(system), system.networks(), system.batch(8), KEY)
  before = jax.device_get(state)
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, system.networks())
  state, metrics = step(state, broken, system.batch(8), KEY)
  assert float(metrics['skipped']) == 1 and np.isnan(metrics['loss'])
  for name in ('params', 'opt_state', 'ema'):
    jax.tree.map(np.testing.assert_array_equal, before[name], jax.device_get(state[name]))
  assert int(state['step']) == 2
  state, metrics = step(state, system.networks(), system.batch(8), KEY)
  assert float(metrics['skipped']) == 0 and _gap(before['params'], state['params']) > 0


def test_bfloat16_tracks_float32_with_float32_parameters(line_system, optim):
  exact, rough = line_system(), line_system(dtype='bfloat16')
  _, expected = _run(exact, optim(), steps=10)
  state, history = _run(rough, optim(), steps=10)
  assert {leaf.dtype for leaf in jax.tree.leaves(state['params'])} == {jnp.dtype('float32')}
  for ours, theirs in zip(history, expected):
    np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=2e-2)
  assert history[-1]['loss/tokens'] != expected[-1]['loss/tokens']


def test_eval_step_means_equal_the_losses_of_the_train_step(line_system, optim):
  system = line_system()
  _, history = _run(system, optim())
  evaluate = make_eval_step(system, system.stages[ALL])
  params = _state(system)['params']
  sums, counts = evaluate(params, system.networks(), system.batch(8), KEY, jnp.int32(0))
  for name, value in sums.items():
    np.testing.assert_allclose(value / counts[name], history[0][f'loss/{name}'], rtol=1e-6)


def test_losses_without_counts_are_refused(line_system, optim):
  class Forgetful(type(line_system())):
    """A system with a loss term that has no count."""

    def losses(self, *args):
      terms = super().losses(*args)
      return terms | {'extra': terms['tokens']}

  system = Forgetful(line_system().config)
  with pytest.raises(ValueError, match='must agree'):
    _run(system, optim())


def test_stage_that_trains_an_unknown_group_is_refused(line_system, optim):
  system = line_system()
  stage = Stage('typo', ('heads/',), {'tokens': 1.0, 'watched': 0.0}, ema=False)
  step = make_train_step(system, stage, optim())
  with pytest.raises(ValueError, match="trains 'heads/'"):
    step(_state(system), system.networks(), system.batch(8), KEY)
