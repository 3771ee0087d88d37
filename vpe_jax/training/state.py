"""The state of a run, and how a stage divides parameters into trainable and frozen leaves.

State is a plain dict: {stage, step, stage_step, examples_seen, params, opt_state, ema}. `params`
holds every parameter; `opt_state` (see training/optimizer.py) and `ema` hold trainable leaves
only, under the same paths. `ema` is an empty dict in a stage that keeps no average.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.config import OptimConfig
from vpe_jax.contracts import Params, Stage, UserError
from vpe_jax.sharding import AxesTable, leaves_by_path
from vpe_jax.training import optimizer

State = dict[str, Any]
COUNTERS = ('stage', 'step', 'stage_step', 'examples_seen')


def split_trainable(params: Params, stage: Stage) -> tuple[Params, Params]:
  """Divides parameters by the stage's regular expressions into (trainable, frozen).

  Both are nested dicts without empty branches; `merge` puts them together again.

  Raises:
    UserError: a regular expression of the stage matches no parameter.
  """
  paths = list(leaves_by_path(params))
  for pattern in stage.trainable:
    if not any(re.match(pattern, path) for path in paths):
      heads = ', '.join(sorted({path.split('/')[0] for path in paths}))
      raise UserError(
        f"stage '{stage.name}' trains '{pattern}', which matches no parameter; "
        f'paths begin with: {heads}'
      )

  chosen = _select(params, lambda path: stage.trains(path))
  return chosen, _select(params, lambda path: not stage.trains(path))


def merge(ours: Params, others: Params) -> Params:
  """Joins two nested dicts; a leaf in both is taken from `ours`."""
  joined = dict(others)
  for key, value in ours.items():
    if isinstance(value, Mapping) and key in others:
      joined[key] = merge(value, others[key])
    else:
      joined[key] = value
  return joined


def first_state(
  params: Params, stage: Stage, optim: OptimConfig | None = None, axes: AxesTable = ()
) -> State:
  """The state before the first step of a run; `params` is owned by the state from here on.

  Args:
    params: every parameter.
    stage: the first.
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
  """The state before the first step of the stage that follows: optimizer and average afresh.

  What has an average and trains no further is kept at it, as later nothing else remembers it: a
  run is judged, and its networks are exported, by their averages. What goes on training goes on
  from the raw parameters.

  Args:
    state: the last of the stage before; its optimizer, average, and the raw parameters in whose
      place an average is kept are given up.
    stage: the stage that follows.
    optim: its optimizer settings (None: the defaults).
    axes: the system's `logical_axes`.
    shardings: of every leaf of the new state (None: one device).
  """
  before, average = leaves_by_path(state['params']), leaves_by_path(state['ema'])
  ends = {path for path in average if not stage.trains(path)}
  kept = _select(state['ema'], lambda path: path in ends)
  gone = [before[path] for path in ends]
  gone += [leaf for path, leaf in average.items() if path not in ends]
  for leaf in [*gone, *jax.tree.leaves(state['opt_state'])]:
    leaf.delete()
  params = merge(kept, state['params'])
  out = shardings and {name: shardings[name] for name in ('opt_state', 'ema')}
  fresh = jax.jit(lambda params: _fresh(params, stage, optim, axes), out_shardings=out)(params)
  return {
    'stage': state['stage'] + 1,
    'step': state['step'],
    'stage_step': jnp.zeros_like(state['stage_step']),
    'examples_seen': state['examples_seen'],
    'params': params,
    **fresh,
  }


def weights(state: State) -> Params:
  """The parameters to evaluate: averaged where there are averages, else raw."""
  return merge(state['ema'], state['params'])


def _fresh(
  params: Params, stage: Stage, optim: OptimConfig | None, axes: AxesTable
) -> dict[str, Any]:
  trainable, _ = split_trainable(params, stage)
  # Copies: a buffer that sits in the state twice could not be donated to the step.
  average = jax.tree.map(jnp.copy, trainable) if stage.ema else {}
  return {'opt_state': optimizer.init(trainable, optim, axes), 'ema': average}


def _select(tree: Params, keep: Callable[[str], bool], prefix: str = '') -> dict[str, Any]:
  kept = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      branch = _select(value, keep, f'{prefix}{key}/')
      if branch:
        kept[key] = branch
    elif keep(f'{prefix}{key}'):
      kept[key] = value
  return kept
