"""Tests of splitting parameters and of the state between stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import COUNTERS, Stage, UserError
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import state as state_lib


def _params():
  return {
    'ar': {'q': {'kernel': jnp.ones(2)}, 'norm': {'scale': jnp.ones(3)}},
    'arctic': jnp.ones(4),
    'dit': {'q': {'kernel': jnp.ones(5)}},
  }


def _stage(*patterns, ema=False):
  return Stage('s', patterns, {}, ema=ema)


def test_split_matches_from_the_start_of_the_path_and_merges_back():
  params = _params()
  trainable, frozen = state_lib.split_trainable(params, _stage('ar/', 'dit/q'))
  assert sorted(leaves_by_path(trainable)) == ['ar/norm/scale', 'ar/q/kernel', 'dit/q/kernel']
  assert sorted(leaves_by_path(frozen)) == ['arctic']
  merged = state_lib.merge(trainable, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params)))


def test_split_has_no_empty_branches():
  trainable, frozen = state_lib.split_trainable(_params(), _stage('ar/norm/scale'))
  assert trainable.keys() == {'ar'} and trainable['ar'].keys() == {'norm'}
  assert frozen['ar'].keys() == {'q'}


def test_pattern_that_matches_nothing_is_an_error():
  # 'kernel' occurs inside paths, but no path begins with it.
  with pytest.raises(UserError, match="trains 'kernel', which matches no parameter.*ar, arctic"):
    state_lib.split_trainable(_params(), _stage('ar/', 'kernel'))


def test_frozen_leaves_have_no_optimizer_state_or_ema():
  state = state_lib.first_state(_params(), _stage('dit/', ema=True))
  for tree in (state['opt_state']['mu'], state['opt_state']['nu'], state['ema']):
    assert list(leaves_by_path(tree)) == ['dit/q/kernel']
  assert state_lib.first_state(_params(), _stage('dit/'))['ema'] == {}


def test_next_stage_resets_optimizer_and_starts_ema_from_current_parameters():
  state = state_lib.first_state(_params(), _stage('ar/', ema=True))
  state |= {name: jnp.int32(n) for n, name in enumerate(COUNTERS, 3)}
  state['params']['dit']['q']['kernel'] = jnp.full(5, 7.0)
  state['opt_state']['count'] = jnp.int32(9)
  after = state_lib.next_stage(state, _stage('dit/', ema=True))
  assert [int(after[name]) for name in COUNTERS] == [4, 4, 0, 6]
  assert int(after['opt_state']['count']) == 0
  assert list(leaves_by_path(after['opt_state']['mu'])) == ['dit/q/kernel']
  np.testing.assert_array_equal(after['ema']['dit']['q']['kernel'], np.full(5, 7.0))


def test_finished_parameters_keep_their_ema_value():
  state = state_lib.first_state(_params(), _stage('ar/', ema=True))
  state['ema'] = jax.tree.map(lambda leaf: leaf * 3, state['ema'])
  after = state_lib.next_stage(state, _stage('ar/norm', 'dit/', ema=True))
  params = leaves_by_path(after['params'])
  assert {path: float(leaf[0]) for path, leaf in params.items()} == {
    'ar/q/kernel': 3.0,  # its last EMA value
    'ar/norm/scale': 1.0,  # still trains, so it keeps its raw value
    'arctic': 1.0,
    'dit/q/kernel': 1.0,
  }
  assert sorted(leaves_by_path(after['ema'])) == ['ar/norm/scale', 'dit/q/kernel']
  np.testing.assert_array_equal(after['ema']['ar']['norm']['scale'], np.ones(3))


def test_weights_are_the_ema_where_it_exists():
  state = state_lib.first_state(_params(), _stage('dit/', ema=True))
  state['ema'] = jax.tree.map(lambda leaf: leaf * 3, state['ema'])
  weights = leaves_by_path(state_lib.weights(state))
  assert float(weights['dit/q/kernel'][0]) == 3 and float(weights['arctic'][0]) == 1
