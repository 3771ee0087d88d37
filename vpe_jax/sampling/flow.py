"""Samples by following a flow from noise (t = 1) to data (t = 0), as an ODE or an SDE.

Every step calls a velocity network against cached prefixes, with all branches of guidance in one
batch. Steps that differ in which branches count, or in what the prefixes hold, are separate scans
of one program.
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
  """Times from 1 (noise) to 0 (data) for `steps` calls of the network.

  A uniform grid t is moved towards noise by t' = s t / (1 + (s - 1) t). Show-o2
  (transport/integrators.py) spaces K points u in its own clock u = 1 - t as u / (u + s - s u),
  s = 3, which is the same grid; its K points make K - 1 calls: `time_grid(K - 1, 3.0)`.

  Args:
    steps: number of steps, each one call of the network by `euler` and `sde`.
    shift: s, above 0; 1 leaves the grid uniform and larger values spend more steps near noise.

  Returns:
    float32 [steps + 1], strictly falling, with exact ends 1 and 0.

  Raises:
    UserError: no step at all, or a shift that isn't positive.
  """
  _check_steps(steps)
  if not 0 < shift < float('inf'):
    raise UserError(f'shift is {shift}: it must be a positive number (1 is a uniform grid)')
  uniform = np.linspace(1.0, 0.0, steps + 1)
  return np.asarray(shift * uniform / (1 + (shift - 1) * uniform), np.float32)


def power_grid(steps: int, power: float = 2.0) -> np.ndarray:
  """A uniform grid to a power: with 2, SSDD's, which spends more steps near data.

  Args:
    steps: number of steps.
    power: above 0; 1 leaves the grid uniform.

  Returns:
    float32 [steps + 1], strictly falling, with exact ends 1 and 0.

  Raises:
    UserError: no step at all, or a power that isn't positive.
  """
  _check_steps(steps)
  if not 0 < power < float('inf'):
    raise UserError(f'power is {power}: it must be a positive number (1 is a uniform grid)')
  return np.asarray(np.linspace(1.0, 0.0, steps + 1) ** power, np.float32)


def last_step_grid(steps: int, last: float = 0.04) -> np.ndarray:
  """A uniform grid down to `last`, and one step from there to 0: that of VGT's flow head.

  VGT (src/models/flow_head.py) spaces `steps` points in its own clock 1 - t from 0 to 1 - last.

  Args:
    steps: number of steps, at least 2.
    last: size of the last step, between 0 and 1.

  Returns:
    float32 [steps + 1], strictly falling, with exact ends 1 and 0.

  Raises:
    UserError: fewer than 2 steps, or an impossible last step.
  """
  _check_steps(steps, 2)
  if not 0 < last < 1:
    raise UserError(f'the last step is {last}: it must lie between 0 and 1')
  return np.append(np.linspace(1.0, last, steps), 0.0).astype(np.float32)


def _check_steps(steps: int, least: int = 1) -> None:
  if steps < least:
    raise UserError(f'steps is {steps}: this sampler needs at least {least}')


def integrate(
  velocity: Velocity,
  state: Array,
  times: np.ndarray | Array,
  method: str = 'euler',
  keys: Array | None = None,
  steps: range | None = None,
) -> Array:
  """Follows v = eps - x along falling times, for one velocity function.

  With d = t - t' the step from t to t' is, by `method`:
    euler: x - d v(x, t).
    heun: the mean of two Euler steps, along v(x, t) and along v at their end; two network calls.
    sde: x - d [(2 - t) v + x] + sqrt(2 t d) xi, Euler-Maruyama with the score that v implies: VGT's
      sampler. It draws from the same marginals as the ODE. The very last step is Euler's.

  Args:
    velocity: in any float dtype.
    state: the state at the first time, [B, ...].
    times: falling times [S + 1].
    method: a name of METHODS.
    keys: [B], one key a batch element; read by `sde`: xi of step i comes from `fold_in(key, i)`.
    steps: consecutive steps of 0 .. S - 1 to take; None: all.

  Returns:
    The state at the end of the last step, float32 whatever the network computes in.
  """
  if method not in METHODS:
    raise UserError(f'the flow sampler is {method!r}: it must be one of {", ".join(METHODS)}')
  if method == 'sde' and keys is None:
    raise ValueError('the SDE sampler needs one key a batch element')
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

  here = slice(steps.start, steps.stop)
  spans = times[:-1][here], times[1:][here], jnp.arange(steps.start, steps.stop, dtype=jnp.int32)
  body = {'euler': euler, 'heun': heun, 'sde': sde}[method]
  return jax.lax.scan(body, state.astype(jnp.float32), spans)[0]


@dataclasses.dataclass(frozen=True)
class Phase:
  """Consecutive steps under the same conditions.

  Attributes:
    steps: their number.
    guidance: of these steps.
    prefix: makes the prefix [B] of a branch from the names of the conditions that it drops. It is
      called once for each branch that counts in these steps.
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
  """Guided data [B, ...] float32 from noise: `integrate` with branches and prefixes.

  Args:
    network: takes the state, a time and the stacked prefixes of all branches; it may share among
      branches what doesn't depend on them.
    noise: the state at the first time, [B, ...].
    times: falling times [S + 1], static: see `time_grid`.
    phases: in the order of the steps, of which they take S together.
    method: see `integrate`.
    keys: see `integrate`.

  Raises:
    ValueError: the phases take more or fewer steps than there are.
  """
  total, first, state = len(times) - 1, 0, noise
  if (taken := sum(phase.steps for phase in phases)) != total:
    raise ValueError(f'the phases take {taken} steps of {total}')
  for phase in phases:
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
  """Runs of steps of a phase within which guidance acts, or doesn't act, throughout."""
  acts = phase.guidance.acts(times[first : first + phase.steps])
  ends = [*(np.flatnonzero(acts[1:] != acts[:-1]) + 1), phase.steps]
  for start, end in zip([0, *ends[:-1]], ends):
    guidance = phase.guidance if acts[start] else UNGUIDED
    yield range(first + start, first + end), guidance
