"""The time grid and the Euler solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.sampling import solver


def test_one_step_of_size_one_along_the_true_velocity_lands_on_the_data():
  data, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
  drawn = solver.euler(lambda x, t: noise - data, noise, solver.time_grid(1, 3.0))
  np.testing.assert_allclose(drawn, data, atol=1e-6)


@pytest.mark.parametrize('steps', [1, 2, 7, 49])
@pytest.mark.parametrize('shift', [0.5, 1.0, 3.0])
def test_grid_falls_from_one_to_zero(steps, shift):
  times = np.asarray(solver.time_grid(steps, shift))
  assert times.shape == (steps + 1,) and times.dtype == np.float32
  assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()


def test_grid_is_that_of_showo2_in_our_clock():
  clock = np.linspace(0, 1, 50)  # 50 points of its clock (0 noise, 1 data) make 49 calls
  theirs = clock / (clock + 3 - 3 * clock)
  np.testing.assert_allclose(solver.time_grid(49, 3.0), 1 - theirs, atol=1e-6)


def test_shift_spends_steps_near_noise():
  uniform, shifted = solver.time_grid(10, 1.0), solver.time_grid(10, 3.0)
  np.testing.assert_allclose(uniform, np.linspace(1, 0, 11), atol=1e-6)
  assert (shifted[1:-1] > uniform[1:-1]).all()


def test_network_is_called_at_every_time_but_the_last():
  times = solver.time_grid(4, 3.0)
  seen = []

  def velocity(x, t):
    jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
    return jnp.zeros_like(x)

  jax.block_until_ready(solver.euler(velocity, jnp.zeros(2), times))
  jax.effects_barrier()
  np.testing.assert_allclose(seen, times[:-1])


def test_error_falls_with_the_step():
  # dx/dt = x from t = 1 to 0 has the solution x(0) = x(1) / e.
  errors = []
  for steps in (10, 20, 40):
    drawn = solver.euler(lambda x, t: x, jnp.ones(1), solver.time_grid(steps, 1.0))
    errors.append(abs(float(drawn[0]) - np.exp(-1)))
  assert 1.8 < errors[0] / errors[1] < 2.3 and 1.8 < errors[1] / errors[2] < 2.3


def test_state_is_float32_for_a_bfloat16_network():
  drawn = solver.euler(
    lambda x, t: jnp.ones_like(x, jnp.bfloat16), jnp.zeros(1, jnp.bfloat16), solver.time_grid(30)
  )
  assert drawn.dtype == jnp.float32
  np.testing.assert_allclose(drawn, -1, atol=1e-5)


@pytest.mark.parametrize('steps, shift', [(0, 3.0), (-1, 3.0), (5, 0.0), (5, float('nan'))])
def test_impossible_grids_are_refused(steps, shift):
  with pytest.raises(UserError):
    solver.time_grid(steps, shift)
