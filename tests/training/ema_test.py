"""Tests of the EMA of parameters."""

import jax.numpy as jnp
import numpy as np

from vpe_jax.training import ema


def test_decay_grows_to_its_limit():
  decays = [float(ema.decay_at(jnp.int32(step), 0.9)) for step in (0, 8, 80, 10_000)]
  np.testing.assert_allclose(decays, [0.1, 0.5, 0.9, 0.9], rtol=1e-6)


def test_average_follows_the_recursion():
  average, expected = {'kernel': jnp.float32(1.0)}, 1.0
  for step, value in enumerate([2.0, 5.0, -1.0]):
    average = ema.update(average, {'kernel': jnp.float32(value)}, jnp.int32(step), 0.2)
    decay = min(0.2, (1 + step) / (10 + step))
    expected = decay * expected + (1 - decay) * value
  np.testing.assert_allclose(float(average['kernel']), expected, rtol=1e-6)
