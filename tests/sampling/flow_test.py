"""Time grids, the solvers of ODE and SDE, and phases of guidance and conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.sampling import flow
from vpe_jax.sampling.guidance import UNGUIDED, Guidance
from vpe_jax.sampling.prefix import Prefix

KEYS = jax.random.split(jax.random.key(2), 3)


@pytest.mark.parametrize('method', flow.METHODS)
def test_one_step_along_the_true_velocity_reaches_the_data(method):
  data, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
  velocity = lambda x, t, i: noise - data
  samples = flow.integrate(velocity, noise, flow.time_grid(1, 3.0), method, KEYS)
  np.testing.assert_allclose(samples, data, atol=1e-6)


@pytest.mark.parametrize('steps', [2, 7, 49])
@pytest.mark.parametrize(
  'grid',
  [
    lambda steps: flow.time_grid(steps, 0.5),
    flow.time_grid,
    lambda steps: flow.time_grid(steps, 3.0),
    flow.power_grid,
    flow.last_step_grid,
  ],
)
def test_grids_decrease_from_one_to_zero(grid, steps):
  times = grid(steps)
  assert times.shape == (steps + 1,) and times.dtype == np.float32
  assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()


def test_grid_of_one_step_has_two_times():
  for grid in (flow.time_grid, flow.power_grid):
    np.testing.assert_array_equal(grid(1), [1.0, 0.0])


def test_power_grid_spends_steps_near_data():
  np.testing.assert_allclose(flow.power_grid(4), [1, 9 / 16, 1 / 4, 1 / 16, 0])


def test_last_step_grid_is_vgts_in_our_time():
  theirs = [*np.linspace(0.0, 0.96, 30), 1.0]
  np.testing.assert_allclose(flow.last_step_grid(30), 1 - np.asarray(theirs), atol=1e-6)


def test_grid_is_showo2s_in_our_time():
  time = np.linspace(0, 1, 50)  # its 50 times (0 is noise, 1 is data) make 49 calls
  theirs = time / (time + 3 - 3 * time)
  np.testing.assert_allclose(flow.time_grid(49, 3.0), 1 - theirs, atol=1e-6)


def test_shift_spends_steps_near_noise():
  uniform, shifted = flow.time_grid(10, 1.0), flow.time_grid(10, 3.0)
  np.testing.assert_allclose(uniform, np.linspace(1, 0, 11), atol=1e-6)
  assert (shifted[1:-1] > uniform[1:-1]).all()


def test_network_is_called_at_every_time_but_the_last():
  times = flow.time_grid(4, 3.0)
  called_times = []

  def velocity(x, t, i):
    jax.debug.callback(lambda t: called_times.append(float(t)), t, ordered=True)
    return jnp.zeros_like(x)

  jax.block_until_ready(flow.integrate(velocity, jnp.zeros(2), times))
  jax.effects_barrier()
  np.testing.assert_allclose(called_times, times[:-1])


def test_error_falls_with_the_step_size():
  # dx/dt = x from t = 1 to 0 has the solution x(0) = x(1) / e.
  errors = []
  for steps in (10, 20, 40):
    samples = flow.integrate(lambda x, t, i: x, jnp.ones(1), flow.time_grid(steps, 1.0))
    errors.append(abs(float(samples[0]) - np.exp(-1)))
  assert 1.8 < errors[0] / errors[1] < 2.3 and 1.8 < errors[1] / errors[2] < 2.3


def test_state_is_float32_for_a_bfloat16_network():
  samples = flow.integrate(
    lambda x, t, i: jnp.ones_like(x, jnp.bfloat16), jnp.zeros(1, jnp.bfloat16), flow.time_grid(30)
  )
  assert samples.dtype == jnp.float32
  np.testing.assert_allclose(samples, -1, atol=1e-5)


@pytest.mark.parametrize(
  'grid',
  [
    lambda: flow.time_grid(0, 3.0),
    lambda: flow.time_grid(-1),
    lambda: flow.time_grid(5, 0.0),
    lambda: flow.time_grid(5, float('nan')),
    lambda: flow.power_grid(0),
    lambda: flow.power_grid(5, 0.0),
    lambda: flow.last_step_grid(1),
    lambda: flow.last_step_grid(5, 1.0),
    lambda: flow.integrate(lambda x, t, i: x, jnp.ones(1), flow.time_grid(3), 'rk4'),
  ],
)
def test_impossible_settings_are_refused(grid):
  with pytest.raises(UserError):
    grid()


def test_heun_is_of_second_order():
  errors = []
  for steps in (5, 10, 20):
    samples = flow.integrate(lambda x, t, i: x, jnp.ones(1), flow.time_grid(steps), 'heun')
    errors.append(abs(float(samples[0]) - np.exp(-1)))
  assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5


def test_a_step_of_the_sde_is_vgts_euler_maruyama():
  """reference: its formula, in its time u = 1 - t and with its velocity (data minus noise)."""
  times = np.asarray([1.0, 0.7, 0.2, 0.0], np.float32)
  velocity = lambda x, t, i: jnp.tanh(x) + t
  x = np.asarray(jax.random.normal(jax.random.key(1), (3, 4, 2)), np.float64)
  for step in range(3):
    samples = flow.integrate(
      velocity, jnp.asarray(x, jnp.float32), times, 'sde', KEYS, range(step, step + 1)
    )
    u, d = 1 - float(times[step]), float(times[step] - times[step + 1])
    v = -(np.tanh(x) + 1 - u)
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, step)
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (4, 2)))(keys))
    score = (u * v - x) / ((1 - u) ** 2 + u * (1 - u))
    expected = x + (v + (1 - u) * score) * d + np.sqrt(2 * (1 - u)) * noise * np.sqrt(d)
    simplified = x + ((1 + u) * v - x) * d + np.sqrt(2 * (1 - u) * d) * noise
    np.testing.assert_allclose(expected, simplified, rtol=1e-5)
    if step == 2:  # the last step is Euler's
      expected = x + v * d
    np.testing.assert_allclose(samples, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('method', flow.METHODS)
def test_samples_of_a_gaussian_have_its_moments(method):
  """Along the exact velocity of data N(2, 0.5^2), the mean of eps - x given x_t."""
  mean, deviation, count = 2.0, 0.5, 10_000

  def velocity(x, t, i):
    residual = (x - (1 - t) * mean) / ((1 - t) ** 2 * deviation**2 + t**2)
    return t * residual - (mean + (1 - t) * deviation**2 * residual)

  keys = jax.random.split(jax.random.key(3), count)
  noise = jax.random.normal(jax.random.key(4), (count,))
  times = flow.last_step_grid(100, 0.01)
  samples = jax.jit(lambda x: flow.integrate(velocity, x, times, method, keys))(noise)
  assert abs(float(samples.mean()) - mean) < 0.02 and abs(float(samples.std()) - deviation) < 0.02
  # The ODE maps noise to data; the SDE forgets the noise.
  correlation = float(jnp.corrcoef(noise, samples)[0, 1])
  assert correlation > 0.99 if method != 'sde' else correlation < 0.5


def test_sde_converges_to_a_single_data_point():
  """The exact velocity towards one point cancels the added noise."""
  data = jnp.asarray([[1.5, -2.0]] * 3)
  velocity = lambda x, t, i: (x - data) / t
  samples = flow.integrate(velocity, jnp.ones((3, 2)), flow.last_step_grid(30), 'sde', KEYS)
  np.testing.assert_allclose(samples, data, atol=1e-5)


def test_sde_noise_depends_on_the_keys_and_not_the_batch():
  x = jax.random.normal(jax.random.key(1), (3, 4))
  run = lambda x, keys: flow.integrate(lambda x, t, i: x, x, flow.time_grid(5), 'sde', keys)
  together = run(x, KEYS)
  np.testing.assert_array_equal(run(x[::-1], KEYS[::-1]), together[::-1])
  np.testing.assert_array_equal(run(x[1:2], KEYS[1:2]), together[1:2])
  with pytest.raises(ValueError, match='key'):
    run(x, None)


NAMES = frozenset({'text'})


def _network(x, time, prefix):
  """The velocity of each branch: the sine of `x + time`, at the frequency in its cache."""
  count = prefix.cache.shape[0] // x.shape[0]
  return jnp.sin(3 * jnp.concatenate([x + time] * count) * prefix.cache[:, None])


def _prefix(calls, conditional=1.0):
  def make(dropped):
    calls.append(dropped)
    return Prefix(jnp.full((3,), 0.4 if dropped else conditional), ())

  return make


def _uncached(x, times, weights, conditional=lambda i: 1.0):
  """Euler steps in float64; step i has the branch weights `weights[i]`."""
  x = np.asarray(x, np.float64)
  for i, (start, end) in enumerate(zip(times[:-1], times[1:])):
    flows = [np.sin(3 * (x + start) * frequency) for frequency in (conditional(i), 0.4)]
    x = x - (float(start) - float(end)) * sum(w * f for w, f in zip(weights[i], flows))
  return x


@pytest.mark.parametrize(
  'guidance, scales',
  [
    (UNGUIDED, [1.0] * 8),
    (Guidance.classifier_free(3.0, NAMES), [3.0] * 8),
    (Guidance.classifier_free(0.0, NAMES), [0.0] * 8),
    # Starts of the steps: 1, 7/8, ..., 1/8.
    (Guidance.classifier_free(3.0, NAMES, interval=(0.25, 0.75)), [1, 1, 3, 3, 3, 3, 1, 1]),
    (Guidance.classifier_free(3.0, NAMES, interval=(0.5, 1.0)), [3, 3, 3, 3, 1, 1, 1, 1]),
    (Guidance.classifier_free(3.0, NAMES, interval=(0.0, 0.0)), [1.0] * 8),
    (
      Guidance.classifier_free(3.0, NAMES, schedule='linear'),
      [1 + 2 * (8 - i) / 8 for i in range(8)],
    ),
    (
      Guidance.classifier_free(3.0, NAMES, schedule='linear', interval=(0.5, 1.0)),
      [1 + 2 * (8 - i) / 8 if i < 4 else 1 for i in range(8)],
    ),
  ],
)
def test_guided_steps_equal_uncached_ones(guidance, scales):
  noise, times, calls = jax.random.normal(jax.random.key(5), (3, 4)), flow.time_grid(8), []
  phases = [flow.Phase(8, guidance, _prefix(calls))]
  samples = flow.sample(_network, noise, times, phases)
  expected = _uncached(noise, times, [(scale, 1 - scale) for scale in scales])
  np.testing.assert_allclose(samples, expected, rtol=1e-4, atol=1e-5)
  # A branch without weight is never computed; each other prefix is computed once.
  used = {frozenset(): any(scales), NAMES: any(scale != 1 for scale in scales)}
  assert sorted(calls, key=len) == [dropped for dropped, is_needed in used.items() if is_needed]


def test_steps_outside_the_interval_run_the_conditional_branch_alone():
  sizes = []

  def network(x, time, prefix):
    sizes.append(prefix.cache.shape[0])
    return _network(x, time, prefix)

  guidance = Guidance.classifier_free(3.0, NAMES, interval=(0.25, 0.75))
  phases = [flow.Phase(8, guidance, _prefix([]))]
  flow.sample(network, jnp.ones((3, 4)), flow.time_grid(8), phases)
  assert sizes == [3, 6, 3]  # traced once for each interval of steps


def test_conditions_may_change_after_some_steps():
  """Each phase has its own prefixes and guidance."""
  noise, times = jax.random.normal(jax.random.key(6), (3, 4)), flow.time_grid(6, 2.0)
  phases = [
    flow.Phase(2, Guidance.classifier_free(1.5, NAMES), _prefix([], conditional=0.8)),
    flow.Phase(4, UNGUIDED, _prefix([], conditional=1.2)),
  ]
  samples = jax.jit(lambda noise: flow.sample(_network, noise, times, phases))(noise)
  weights = [(1.5, -0.5)] * 2 + [(1.0, 0.0)] * 4
  expected = _uncached(noise, times, weights, lambda i: 0.8 if i < 2 else 1.2)
  np.testing.assert_allclose(samples, expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match='4 steps'):
    flow.sample(_network, noise, times, phases[1:])


def test_phases_and_segments_continue_the_noise_of_the_sde():
  """The split into phases changes nothing."""
  noise, times = jax.random.normal(jax.random.key(7), (3, 4)), flow.time_grid(6)
  run = lambda *counts: flow.sample(
    _network, noise, times, [flow.Phase(n, UNGUIDED, _prefix([])) for n in counts], 'sde', KEYS
  )
  np.testing.assert_allclose(run(6), run(2, 3, 1), rtol=1e-6)
