"""The training step: a pure function from state and batch to state and metrics.

Trainable leaves are separated before differentiation, so the compiled step computes no weight
gradient of a frozen leaf. The counts of all losses in the whole batch are known before the first
microbatch. Each microbatch's gradient is divided by these counts, so the sum over microbatches is
the gradient of the whole batch, whatever the number of microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vpe_jax import sharding
from vpe_jax.config import OptimConfig
from vpe_jax.contracts import Array, Batch, LossTerm, Params, Stage, State, System
from vpe_jax.training import ema, optimizer
from vpe_jax.training.state import merge, split_trainable

Metrics = dict[str, Array]
Sums = dict[str, Array]


def make_train_step(
  system: System, stage: Stage, optim: OptimConfig, shardings: State | None = None
) -> Callable[[State, Params, Batch, Array], tuple[State, Metrics]]:
  """Builds the jitted step of one stage, which donates the state's buffers.

  Args:
    system: defines the losses.
    stage: selects the trainable leaves and the losses.
    optim: optimizer settings of the stage (Config.optim_of); `accumulate` is the number of
      microbatches of a step.
    shardings: sharding of each leaf of the state (None: one device). Gradients have the sharding of
      their parameters, also during accumulation.

  Returns:
    step(state, frozen, batch, rng) -> (state, metrics). Metrics are float32 scalars: `loss` (the
    weighted total), `loss/<name>`, `weight/<name>` of scheduled terms, `grad_norm` before
    clipping, `lr`, and `skipped` (1 if loss or gradient was not finite, so that parameters,
    optimizer state and EMA were not updated).
  """
  constrain = _gradient_constraint(shardings, stage)

  def step(state: State, frozen: Params, batch: Batch, rng: Array) -> tuple[State, Metrics]:
    trainable, fixed = split_trainable(state['params'], stage)
    counts = system.counts(batch, rng, state['stage_step'], stage)

    def objective(trainable: Params, part: Batch) -> tuple[Array, tuple[Sums, Metrics]]:
      params = merge(trainable, fixed)
      terms = system.losses(params, frozen, part, rng, state['stage_step'], stage)
      return total(terms, counts), (_sums(terms), _scheduled_weights(terms))

    gradient, loss, sums, scheduled = _differentiate(
      objective, trainable, batch, optim.accumulate, constrain
    )
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    metrics = {
      'loss': loss,
      **_means(sums, counts),
      **scheduled,
      'grad_norm': norm,
      'lr': optimizer.learning_rate(state['stage_step'], optim),
      'skipped': 1.0 - finite.astype(jnp.float32),
    }
    clipped = optimizer.clip(gradient, norm, optim.clip)
    updated = _updated(state, trainable, clipped, optim, system.logical_axes)
    previous = {'params': trainable, 'opt_state': state['opt_state'], 'ema': state['ema']}
    selected = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, previous)
    return {
      'stage': state['stage'],
      'step': state['step'] + 1,
      'stage_step': state['stage_step'] + 1,
      'examples_seen': state['examples_seen'] + batch.example.shape[0],
      **selected,
      'params': merge(selected['params'], fixed),
    }, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

  out = None if shardings is None else (shardings, None)
  options = sharding.compiler_options()
  return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)


def _differentiate(
  objective: Callable[[Params, Batch], tuple[Array, tuple[Sums, Metrics]]],
  trainable: Params,
  batch: Batch,
  accumulate: int,
  constrain: Callable[[Params], Params],
) -> tuple[Params, Array, Sums, Metrics]:
  """Gradient, loss, loss sums and scheduled weights of the whole batch."""
  with_gradient = jax.value_and_grad(objective, has_aux=True)
  if accumulate == 1:
    (loss, (sums, scheduled)), gradient = with_gradient(trainable, batch)
    return constrain(gradient), loss, sums, scheduled

  def body(carry: Params, part: Batch) -> tuple[Params, Any]:
    (loss, (sums, scheduled)), gradient = with_gradient(trainable, part)
    # Constrained inside the scan, so that each microbatch's gradient is reduced into shards and
    # never stored whole.
    return constrain(jax.tree.map(jnp.add, carry, constrain(gradient))), (loss, sums, scheduled)

  zeros = constrain(jax.tree.map(jnp.zeros_like, trainable))
  gradient, (loss, sums, scheduled) = jax.lax.scan(body, zeros, microbatches(batch, accumulate))
  sums = jax.tree.map(lambda leaf: leaf.sum(0), sums)
  return gradient, loss.sum(), sums, jax.tree.map(lambda leaf: leaf[0], scheduled)


def microbatches(batch: Batch, accumulate: int) -> Batch:
  """Splits [B, ...] leaves into n = `accumulate` microbatches: [n, B / n, ...].

  Microbatch i has batch elements i, i + n, ... Each device has consecutive batch elements. With
  this stride, every microbatch has the same number of elements on each device, and no element moves
  between devices.
  """

  def split(leaf: Array) -> Array:
    strided = leaf.reshape(leaf.shape[0] // accumulate, accumulate, *leaf.shape[1:])
    return jnp.moveaxis(strided, 1, 0)

  return jax.tree.map(split, batch)


def _updated(
  state: State,
  trainable: Params,
  gradient: Params,
  optim: OptimConfig,
  axes: sharding.AxesTable,
) -> State:
  params, opt_state = optimizer.update(
    gradient, state['opt_state'], trainable, state['stage_step'], optim, axes
  )
  average = state['ema']
  if average:
    # The number of updates exceeds the stage's step if the EMA was inherited from a parent run.
    average = ema.update(average, params, state['opt_state']['count'], optim.ema)
  return {'params': params, 'opt_state': opt_state, 'ema': average}


def _has_weight(term: LossTerm) -> bool:
  """Whether a term contributes to the loss."""
  return not (isinstance(term.weight, (int, float)) and term.weight == 0.0)


def total(terms: dict[str, LossTerm], counts: Sums) -> Array:
  """The weighted sum of the mean losses, which training minimizes.

  Raises:
    ValueError: terms and counts have different names.
  """
  if terms.keys() != counts.keys():
    raise ValueError(f'losses {sorted(terms)} but counts {sorted(counts)}: they must agree')
  parts = [
    term.weight * term.sum / jnp.maximum(counts[name], 1).astype(jnp.float32)
    for name, term in terms.items()
    if _has_weight(term)
  ]
  return jnp.asarray(sum(parts), jnp.float32)


def _sums(terms: dict[str, LossTerm]) -> Sums:
  # A term of weight 0 is used only here, inside stop_gradient, so it has no backward pass.
  return {name: jax.lax.stop_gradient(jnp.float32(term.sum)) for name, term in terms.items()}


def _means(sums: Sums, counts: Sums) -> Metrics:
  return {
    f'loss/{name}': value / jnp.maximum(counts[name], 1).astype(jnp.float32)
    for name, value in sums.items()
  }


def _scheduled_weights(terms: dict[str, LossTerm]) -> Metrics:
  return {
    f'weight/{name}': jnp.asarray(term.weight, jnp.float32)
    for name, term in terms.items()
    if not isinstance(term.weight, (int, float))
  }


def _gradient_constraint(shardings: State | None, stage: Stage) -> Callable[[Params], Params]:
  """Constrains gradients to the shardings of their parameters."""
  if shardings is None:
    return lambda gradient: gradient
  target, _ = split_trainable(shardings['params'], stage)
  return lambda gradient: jax.lax.with_sharding_constraint(gradient, target)
