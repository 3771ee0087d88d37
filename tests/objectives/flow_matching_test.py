"""Flow matching: the time convention, path, distributions of times, shifts, targets, weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax import rng
from vpe_jax.contracts import UserError
from vpe_jax.objectives import flow_matching
from vpe_jax.objectives.flow_matching import FlowConfig

KEY = rng.run_key(0)


def test_one_euler_step_from_noise_lands_on_the_data():
  data, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
  start = flow_matching.path(data, noise, jnp.ones(3))
  np.testing.assert_array_equal(start, noise)
  np.testing.assert_allclose(start - flow_matching.velocity(data, noise), data, atol=1e-6)
  np.testing.assert_array_equal(flow_matching.path(data, noise, jnp.zeros(3)), data)


def test_velocity_is_the_derivative_of_the_path():
  data, noise = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 2))
  path = lambda time: flow_matching.path(data, noise, time)
  _, slope = jax.jvp(path, (jnp.full(3, 0.3),), (jnp.ones(3),))
  np.testing.assert_allclose(slope, flow_matching.velocity(data, noise), atol=1e-6)


def test_shift_keeps_the_ends_and_moves_towards_noise():
  time = jnp.linspace(0, 1, 11)
  shifted = flow_matching.shift_time(time, 3.0)
  np.testing.assert_allclose(shifted[jnp.array([0, -1])], [0, 1])
  assert bool((shifted[1:-1] > time[1:-1]).all())


def test_token_shift_is_show_o2s():
  """reference: e^mu = 1.878 at 1,025 tokens, mu = 0.580 at 730."""
  assert abs(flow_matching.token_shift(1025) - 1.878) < 1e-3
  assert abs(np.log(flow_matching.token_shift(730)) - 0.580) < 1e-3


def test_shifts_depend_on_tokens_or_numbers():
  of = lambda **settings: FlowConfig(**settings).total_shift(1025, 16 * 16 * 32)
  assert of() == 1.0 and of(shift=3.0) == 3.0
  assert of(shift_by='resolution') == flow_matching.token_shift(1025)
  # VGT's: sqrt(16 * 16 * 32 / 4096) = 1.41.
  assert abs(of(shift_by='dimension') - 1.414) < 1e-3
  assert of(shift_by='dimension', shift=2.0) == 2 * of(shift_by='dimension')


def _times(flow, shift=1.0):
  keys = jax.random.split(jax.random.key(2), 20_000)
  return jax.vmap(lambda key: flow_matching.sample_time(key, flow, shift))(keys)


def test_the_default_distribution_of_times_is_a_shifted_logit_normal():
  time = _times(FlowConfig(), 2.0)
  # The median of the logit-normal is 1/2, which the shift maps to 2/3.
  assert abs(float(jnp.median(time)) - 2 / 3) < 0.01
  logit = jnp.log(time / (1 - time)) - jnp.log(2.0)
  assert abs(float(logit.mean())) < 0.03 and abs(float(logit.std()) - 1) < 0.03


def test_distributions_of_times_have_their_moments():
  time = _times(FlowConfig(mean=0.7, std=0.5))
  logit = jnp.log(time / (1 - time))
  assert abs(float(logit.mean()) - 0.7) < 0.02 and abs(float(logit.std()) - 0.5) < 0.02
  time = _times(FlowConfig(time_distribution='uniform'))
  assert abs(float(time.mean()) - 0.5) < 0.01 and abs(float(time.var()) - 1 / 12) < 0.003


@pytest.mark.parametrize('target', flow_matching.TARGETS)
def test_every_target_implies_the_velocity(target):
  """A perfect prediction of any target implies the velocity of the path."""
  data, example = jax.random.normal(jax.random.key(3), (64, 4, 4, 2)), jnp.arange(64)
  flow = FlowConfig(target=target, time_distribution='uniform')
  x, time, target_value = flow_matching.noised(data, flow, KEY, example, tokens=16)
  plain = FlowConfig(time_distribution='uniform')
  _, _, velocity = flow_matching.noised(data, plain, KEY, example, tokens=16)
  inner = (time > 0.05) & (time < 0.95)  # nearer to the ends, divisions are bounded
  implied = flow_matching.implied_velocity(flow, target_value, x, time)
  np.testing.assert_allclose(implied[inner], velocity[inner], rtol=1e-4, atol=1e-4)
  assert bool(jnp.isfinite(implied).all()) and int(inner.sum()) > 32
  scalar_time = flow_matching.implied_velocity(flow, target_value[:1], x[:1], time[0])
  np.testing.assert_allclose(scalar_time, implied[:1], rtol=1e-6)


@pytest.mark.parametrize('target', flow_matching.TARGETS)
def test_inputs_and_targets_are_float32_for_bfloat16_data(target):
  data = jnp.ones((3, 4), jnp.bfloat16)
  noised = flow_matching.noised(data, FlowConfig(target=target), KEY, jnp.arange(3), tokens=4)
  assert [x.dtype for x in noised] == [jnp.float32] * 3


@pytest.mark.parametrize('target', flow_matching.TARGETS)
def test_velocity_weighting_gives_the_error_of_the_velocity(target):
  time = jnp.array([0.2, 0.5, 0.9])
  x, target_value, error = jax.random.normal(jax.random.key(4), (3, 3, 5))
  flow = FlowConfig(target=target, weighting='velocity')
  implied = lambda prediction: flow_matching.implied_velocity(flow, prediction, x, time)
  squares = float(jnp.sum(jnp.square(implied(target_value + error) - implied(target_value))))
  weighted = flow_matching.loss(flow, target_value + error, target_value, time)
  np.testing.assert_allclose(float(weighted), squares, rtol=1e-4)
  plain = flow_matching.loss(FlowConfig(target=target), target_value + error, target_value, time)
  np.testing.assert_allclose(float(plain), float(jnp.sum(jnp.square(error))), rtol=1e-4)


def test_squared_error_sums():
  assert float(flow_matching.squared_error(jnp.ones((2, 3)), jnp.zeros((2, 3)))) == 6.0


@pytest.mark.parametrize(
  'field, value',
  [
    ('time_distribution', 'normal'), ('target', 'score'), ('weighting', 'snr'),
    ('shift_by', 'size'), ('shift', 0.0), ('std', 0.0), ('mean', float('nan')),
  ],
)  # fmt: skip
def test_invalid_fields_are_named(field, value):
  with pytest.raises(UserError, match=field):
    FlowConfig(**{field: value})
