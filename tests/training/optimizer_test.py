"""Tests of the optimizer against optax's own AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpe_jax.config import OptimConfig
from vpe_jax.training import optimizer


def _leaves(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  return {'kernel': jax.random.normal(keys[0], (3, 4)), 'bias': jax.random.normal(keys[1], (4,))}


def test_equals_optax_adamw_with_warm_up_and_clipping():
  config = OptimConfig(lr=3e-2, warmup=3, b1=0.8, b2=0.95, eps=0.1, clip=0.5, weight_decay=0.1)
  rate = lambda count: 3e-2 * min((count + 1) / 3, 1)
  params = _leaves(0)
  ours, state = params, optimizer.init(params)
  theirs, their_state = params, None
  for step in range(5):
    gradient = jax.tree.map(lambda leaf: leaf * 2, _leaves(step + 1))
    clipped = optimizer.clip(gradient, optax.global_norm(gradient), config.clip)
    ours, state = optimizer.update(clipped, state, ours, jnp.int32(step), config)
    chain = optax.chain(
      optax.clip_by_global_norm(0.5),
      optax.adamw(
        rate(step), 0.8, 0.95, 0.1, weight_decay=0.1, mask={'kernel': True, 'bias': False}
      ),
    )
    their_state = chain.init(theirs) if their_state is None else their_state
    change, their_state = chain.update(gradient, their_state, theirs)
    theirs = optax.apply_updates(theirs, change)
  for name in params:
    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
  assert int(state['count']) == 5


def test_rate_warms_up_to_a_constant():
  config = OptimConfig(lr=2.0, warmup=4)
  rates = [float(optimizer.learning_rate(step, config)) for step in range(6)]
  assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
  assert float(optimizer.learning_rate(0, OptimConfig(lr=2.0, warmup=0))) == 2.0


def test_clip_leaves_small_gradients_and_bounds_large_ones():
  gradient = {'kernel': jnp.array([3.0, 4.0])}
  kept = optimizer.clip(gradient, jnp.float32(5.0), 6.0)
  np.testing.assert_array_equal(kept['kernel'], gradient['kernel'])
  cut = optimizer.clip(gradient, jnp.float32(5.0), 1.0)
  np.testing.assert_allclose(cut['kernel'], [0.6, 0.8], rtol=1e-6)
  assert optimizer.clip(gradient, jnp.float32(5.0), 0.0) is gradient
