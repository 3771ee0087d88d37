"""Flow matching: the time convention, the path, the shift and the time law."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.objectives import flow_matching


def test_one_euler_step_from_noise_lands_on_the_data():
  data, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
  start = flow_matching.path(data, noise, jnp.ones(3))
  np.testing.assert_array_equal(start, noise)
  np.testing.assert_allclose(start - flow_matching.target(data, noise), data, atol=1e-6)
  np.testing.assert_array_equal(flow_matching.path(data, noise, jnp.zeros(3)), data)


def test_target_is_the_derivative_of_the_path():
  data, noise = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 2))
  path = lambda time: flow_matching.path(data, noise, time)
  _, slope = jax.jvp(path, (jnp.full(3, 0.3),), (jnp.ones(3),))
  np.testing.assert_allclose(slope, flow_matching.target(data, noise), atol=1e-6)


def test_shift_keeps_the_ends_and_moves_towards_noise():
  time = jnp.linspace(0, 1, 11)
  shifted = flow_matching.shift_time(time, 3.0)
  np.testing.assert_allclose(shifted[jnp.array([0, -1])], [0, 1])
  assert bool((shifted[1:-1] > time[1:-1]).all())


def test_token_shift_is_show_o2s():
  """reference: e^mu = 1.878 at 1,025 tokens, mu = 0.580 at 730."""
  assert abs(flow_matching.token_shift(1025) - 1.878) < 1e-3
  assert abs(np.log(flow_matching.token_shift(730)) - 0.580) < 1e-3


def test_time_law_is_a_shifted_logit_normal():
  keys = jax.random.split(jax.random.key(2), 20_000)
  time = jax.vmap(lambda key: flow_matching.sample_time(key, 2.0))(keys)
  # The median of the logit-normal is 1/2, which the shift takes to 2/3.
  assert abs(float(jnp.median(time)) - 2 / 3) < 0.01
  logit = jnp.log(time / (1 - time)) - jnp.log(2.0)
  assert abs(float(logit.mean())) < 0.03 and abs(float(logit.std()) - 1) < 0.03


def test_squared_error_sums():
  assert float(flow_matching.squared_error(jnp.ones((2, 3)), jnp.zeros((2, 3)))) == 6.0
