"""Flow sampling from noise (t = 1) to data (t = 0), as an ODE or an SDE.

Every step calls a velocity network on cached prefixes, with all guidance branches in one batch.
Steps with different branches or prefixes are separate scans of one program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, UserError
from vpe_jax.sampling.guidance import UNGUIDED, Guidance, combine
from vpe_jax.sampling.prefix import Prefix

METHODS = ('euler', 'heun', 'sde')

# (state [B, ...] float32, time, step) -> velocity of the same shape; time and step are scalars.
Velocity = Callable[[Array, Array, Array], Array]
# (state [B, ...], time, prefix of n stacked branches) -> velocities [n B, ...]
Network = Callable[[Array, Array, Prefix], Array]


def time_grid(steps: int, shift: float = 1.0) -> np.ndarray:
  """Times from 1 (noise) to 0 (data) for a number of steps.

  A uniform grid t is shifted towards noise by t' = s t / (1 + (s - 1) t). Show-o2
  (transport/integrators.py) spaces K points u = 1 - t as u / (u + s - s u) with s = 3, which is the
  grid of `time_grid(K - 1, 3.0)`.

  Args:
    steps: number of steps; `euler` and `sde` call the network once per step.
    shift: s, above 0; 1 gives a uniform grid, larger values more steps near noise.

  Returns:
    float32 [steps + 1], strictly decreasing, exactly 1 and 0 at the ends.

  Raises:
    UserError: there are no steps, or the shift is not positive.
  """
  _check_steps(steps)
  if not 0 < shift < float('inf'):
    raise UserError(f'shift is {shift}: it must be a positive number (1 is a uniform grid)')
  uniform = np.linspace(1.0, 0.0, steps + 1)
  return np.asarray(shift * uniform / (1 + (shift - 1) * uniform), np.float32)


def power_grid(steps: int, power: float = 2.0) -> np.ndarray:
  """A power of a uniform grid; a power of 2 is SSDD's grid, with more steps near data.

  Args:
    steps: number of steps.
    power: above 0; 1 gives a uniform grid.

  Returns:
    float32 [steps + 1], strictly decreasing, exactly 1 and 0 at the ends.

  Raises:
    UserError: there are no steps, or the power is not positive.
  """
  _check_steps(steps)
  if not 0 < power < float('inf'):
    raise UserError(f'power is {power}: it must be a positive number (1 is a uniform grid)')
  return np.asarray(np.linspace(1.0, 0.0, steps + 1) ** power, np.float32)


def last_step_grid(steps: int, last: float = 0.04) -> np.ndarray:
  """A uniform grid from 1 to `last`, then one step to 0, as in VGT's flow head.

  VGT (src/models/flow_head.py) spaces `steps` values of 1 - t from 0 to 1 - last.

  Args:
    steps: number of steps, at least 2.
    last: size of the last step, between 0 and 1.

  Returns:
    float32 [steps + 1], strictly decreasing, exactly 1 and 0 at the ends.

  Raises:
    UserError: there are fewer than 2 steps, or the last step is out of range.
  """
  _check_steps(steps, 2)
  if not 0 < last < 1:
    raise UserError(f'the last step is {last}: it must be between 0 and 1')
  return np.append(np.linspace(1.0, last, steps), 0.0).astype(np.float32)


def _check_steps(steps: int, minimum: int = 1) -> None:
  if steps < minimum:
    raise UserError(f'steps is {steps}: this sampler needs at least {minimum}')


def integrate(
  velocity: Velocity,
  state: Array,
  times: np.ndarray | Array,
  method: str = 'euler',
  keys: Array | None = None,
  steps: range | None = None,
) -> Array:
  """Integrates v = eps - x along decreasing times.

  The step from t to t' = t - d is, by `method`:
    euler: x - d v(x, t).
    heun: the mean of two Euler steps, with v(x, t) and with v at the end of that step; it calls the
      network twice.
    sde: x - d [(2 - t) v + x] + sqrt(2 t d) xi, Euler-Maruyama with the score implied by v (VGT's
      sampler). It has the same marginals as the ODE. The last step to 0 is an Euler step.

  Args:
    velocity: the velocity function; any float dtype.
    state: [B, ...] at the first time.
    times: decreasing times [S + 1].
    method: a name in METHODS.
    keys: [B], one key per batch element, for `sde`: xi of step i comes from `fold_in(key, i)`.
    steps: consecutive steps of 0 .. S - 1 to take; None: all.

  Returns:
    The state after the last step, float32.

  Raises:
    UserError: the method is unknown.
    ValueError: `sde` has no keys.
  """
  if method not in METHODS:
    raise UserError(f'the flow sampler is {method!r}: it must be one of {", ".join(METHODS)}')
  if method == 'sde' and keys is None:
    raise ValueError('the SDE sampler needs one key per batch element')
  total = len(times) - 1
  steps = range(total) if steps is None else steps
  at = lambda state, time, step: velocity(state, time, step).astype(jnp.float32)

  def euler(state: Array, span: tuple[Array, Array, Array]) -> tuple[Array, None]:
    start, end, step = span
    return state - (start - end) * at(state, start, step), None

  def heun(state: Array, span: tuple[Array, Array, Array]) -> tuple[Array, None]:
    start, end, step = span
    first = at(state, start, step)
    second = at(state - (start - end) * first, end, step)
    return state - (start - end) * 0.5 * (first + second), None

  def sde(state: Array, span: tuple[Array, Array, Array]) -> tuple[Array, None]:
    start, end, step = span
    flow = at(state, start, step)
    # The score is -(x + (1 - t) v) / t, and noise is added at the rate 2 t.
    random = jnp.where(step < total - 1, 1.0, 0.0)
    drift = flow + random * (state + (1.0 - start) * flow)
    normal = lambda key: jax.random.normal(jax.random.fold_in(key, step), state.shape[1:])
    noise = jnp.sqrt(2.0 * start * (start - end)) * jax.vmap(normal)(keys)
    return state - (start - end) * drift + random * noise, None

  selected = slice(steps.start, steps.stop)
  indices = jnp.arange(steps.start, steps.stop, dtype=jnp.int32)
  spans = times[:-1][selected], times[1:][selected], indices
  body = {'euler': euler, 'heun': heun, 'sde': sde}[method]
  return jax.lax.scan(body, state.astype(jnp.float32), spans)[0]


@dataclasses.dataclass(frozen=True)
class Phase:
  """Consecutive steps with the same prefixes.

  Attributes:
    steps: number of steps.
    guidance: guidance of these steps.
    prefix: maps the names of the conditions that a branch drops to the prefix of the branch, with
      batch size B. It is called once for each branch that these steps need.
  """

  steps: int
  guidance: Guidance
  prefix: Callable[[frozenset[str]], Prefix]


def sample(
  network: Network,
  noise: Array,
  times: np.ndarray,
  phases: Sequence[Phase],
  method: str = 'euler',
  keys: Array | None = None,
) -> Array:
  """Samples data [B, ...] float32 from noise with guidance; see `integrate`.

  Args:
    network: velocities from the state, a time and the stacked prefixes of all branches; it can
      share computation between branches.
    noise: [B, ...], the state at the first time.
    times: decreasing times [S + 1], static; see `time_grid`.
    phases: in order; together they have S steps.
    method: see `integrate`.
    keys: see `integrate`.

  Raises:
    ValueError: the phases don't have S steps.
  """
  total, first, state = len(times) - 1, 0, noise
  if (steps := sum(phase.steps for phase in phases)) != total:
    raise ValueError(f'the phases have {steps} steps instead of {total}')
  for phase in (phase for phase in phases if phase.steps):
    prefix = functools.cache(phase.prefix)
    for steps, guidance in _segments(phase, times, first):
      branches = guidance.needed
      stacked = Prefix.stack([prefix(branch.dropped) for branch in branches])

      def velocity(
        state: Array, time: Array, step: Array, stacked=stacked, guidance=guidance
      ) -> Array:
        flows = network(state, time, stacked)
        return combine(guidance, flows, guidance.needed, step, total)

      state = integrate(velocity, state, times, method, keys, steps)
    first += phase.steps
  return state


def _segments(phase: Phase, times: np.ndarray, first: int) -> Iterator[tuple[range, Guidance]]:
  """Splits the steps of a phase into runs in which guidance is on or off throughout."""
  acts = phase.guidance.acts(times[first : first + phase.steps])
  ends = [*(np.flatnonzero(acts[1:] != acts[:-1]) + 1), phase.steps]
  for start, end in zip([0, *ends[:-1]], ends):
    guidance = phase.guidance if acts[start] else UNGUIDED
    yield range(first + start, first + end), guidance
