"""Tests of tracing a range of steps."""

import jax.numpy as jnp
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.training.profiler import Profiler


def test_traces_the_range_and_nothing_else(tmp_path):
  profiler, active = Profiler('3:5', str(tmp_path)), []
  for step in range(1, 8):
    profiler.before(step)
    active.append(profiler._active)
    profiler.after(step, {'loss': jnp.ones(())})
  assert active == [False, False, True, True, False, False, False]
  assert list(tmp_path.rglob('*.xplane.pb'))


@pytest.mark.parametrize('steps', ['5', '5:3', 'a:b', '0:2', '3:'])
def test_a_bad_range_is_refused(steps, tmp_path):
  with pytest.raises(UserError, match='such as 10:13'):
    Profiler(steps, str(tmp_path))


def test_none_is_asked_for_by_default(tmp_path):
  profiler = Profiler('', str(tmp_path))
  profiler.before(1)
  profiler.close()
  assert not list(tmp_path.iterdir())
