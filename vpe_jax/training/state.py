"""The state of a run, and its division into trainable and frozen parameters in a stage.

A state is a plain dict: {stage, step, stage_step, examples_seen, params, opt_state, ema}. `params`
has all parameters; `opt_state` (see training/optimizer.py) and `ema` have trainable leaves only,
under the same paths. `ema` is empty in a stage without EMA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.config import OptimConfig
from vpe_jax.contracts import COUNTERS, Params, Stage, State, UserError
from vpe_jax.sharding import AxesTable, leaves_by_path
from vpe_jax.training import optimizer


def split_trainable(params: Params, stage: Stage) -> tuple[Params, Params]:
  """Divides parameters by the stage's regular expressions into (trainable, frozen).

  Both are nested dicts without empty branches; `merge` is the inverse.

  Raises:
    UserError: a regular expression of the stage matches no parameter.
  """
  paths = list(leaves_by_path(params))
  for pattern in stage.trainable:
    if not any(re.match(pattern, path) for path in paths):
      groups = ', '.join(sorted({path.split('/')[0] for path in paths}))
      raise UserError(
        f"stage '{stage.name}' trains '{pattern}', which matches no parameter; "
        f'paths begin with: {groups}'
      )
  trainable = _select(params, lambda path: stage.trains(path))
  return trainable, _select(params, lambda path: not stage.trains(path))


def merge(ours: Params, others: Params) -> Params:
  """Joins two nested dicts; a leaf in both is taken from `ours`."""
  merged = dict(others)
  for key, value in ours.items():
    if isinstance(value, Mapping) and key in others:
      merged[key] = merge(value, others[key])
    else:
      merged[key] = value
  return merged


def first_state(
  params: Params, stage: Stage, optim: OptimConfig | None = None, axes: AxesTable = ()
) -> State:
  """The state before the first step of a run.

  Args:
    params: all parameters; the state takes ownership of them.
    stage: the first stage.
    optim: its optimizer settings (None: the defaults).
    axes: the system's `logical_axes`.
  """
  zeros = {name: jnp.zeros((), jnp.int32) for name in COUNTERS}
  return {**zeros, 'params': params, **_fresh(params, stage, optim, axes)}


def next_stage(
  state: State,
  stage: Stage,
  optim: OptimConfig | None = None,
  axes: AxesTable = (),
  shardings: State | None = None,
) -> State:
  """The state before the first step of the next stage, with a new optimizer state and EMA.

  Parameters that stop training keep their EMA value, because evaluators and exports use EMA
  values and later states have no EMA of these parameters. Parameters that continue to train start
  from their raw values.

  Args:
    state: the last state of the previous stage. The buffers of its optimizer state, of its EMA
      and of the raw parameters that an EMA value replaces are deleted.
    stage: the next stage.
    optim: its optimizer settings (None: the defaults).
    axes: the system's `logical_axes`.
    shardings: sharding of each leaf of the new state (None: one device).
  """
  raw, average = leaves_by_path(state['params']), leaves_by_path(state['ema'])
  finished_paths = {path for path in average if not stage.trains(path)}
  final_ema = _select(state['ema'], lambda path: path in finished_paths)
  unused = [raw[path] for path in finished_paths]
  unused += [leaf for path, leaf in average.items() if path not in finished_paths]
  for leaf in [*unused, *jax.tree.leaves(state['opt_state'])]:
    leaf.delete()
  params = merge(final_ema, state['params'])
  out_shardings = shardings and {name: shardings[name] for name in ('opt_state', 'ema')}
  make = jax.jit(lambda params: _fresh(params, stage, optim, axes), out_shardings=out_shardings)
  return {
    'stage': state['stage'] + 1,
    'step': state['step'],
    'stage_step': jnp.zeros_like(state['stage_step']),
    'examples_seen': state['examples_seen'],
    'params': params,
    **make(params),
  }


def weights(state: State) -> Params:
  """Parameters for evaluation: EMA values, and raw values of parameters without EMA."""
  return merge(state['ema'], state['params'])


def _fresh(
  params: Params, stage: Stage, optim: OptimConfig | None, axes: AxesTable
) -> dict[str, Any]:
  trainable, _ = split_trainable(params, stage)
  # Copies, because a buffer that is in the state twice can't be donated to the step.
  average = jax.tree.map(jnp.copy, trainable) if stage.ema else {}
  return {'opt_state': optimizer.init(trainable, optim, axes), 'ema': average}


def _select(tree: Params, predicate: Callable[[str], bool], prefix: str = '') -> dict[str, Any]:
  """The leaves whose paths satisfy a predicate, without empty branches."""
  selected = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      branch = _select(value, predicate, f'{prefix}{key}/')
      if branch:
        selected[key] = branch
    elif predicate(f'{prefix}{key}'):
      selected[key] = value
  return selected
