"""Frozen parameters cost nothing: at paper size, by tracing the whole training step."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from configs import edit, t2i
from vpe_jax import rng, systems
from vpe_jax.contracts import Stage, System
from vpe_jax.ops.flops import matrix_flops
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training.model_flops import step_flops
from vpe_jax.training.state import first_state
from vpe_jax.training.step import make_train_step

KEY = rng.run_key(0)
# Of every stage that freezes some: config, options, name, and the groups that stay as they are.
STAGES = [
  (t2i, 'internal', 'plan', {'dit'}),
  (t2i, 'external', 'plan', {'dit'}),
  (t2i, 'external', 'render', {'ar', 'embed'}),
  (edit, 'external', 'edit', {'dit'}),
]


def _system(config_file, arch: str) -> System:
  config = config_file.get_config(f'paper,arch={arch}')
  # Images encoded beforehand, dense attention, nothing recomputed: executed FLOPs are model FLOPs.
  config.data.update(source='synthetic', encode='cached')
  config.update(attention='reference', remat='none')
  config.model.logits_chunk = 0
  return systems.build(config.to_dict())


def _executed_flops(system: System, stage: Stage) -> float:
  """Matrix FLOPs of one training step of two examples, gradients included."""
  state = jax.eval_shape(lambda: first_state(system.init(KEY), stage))
  optim = dataclasses.replace(system.config.optim.of(0), accumulate=1)
  step = make_train_step(system, stage, optim)
  return matrix_flops(step, state, {}, system.batch_spec(2).batch(cached=True), KEY)


@pytest.mark.parametrize('config_file, arch, name, groups', STAGES)
def test_a_frozen_group_has_no_gradient_and_no_memory(config_file, arch, name, groups):
  system = _system(config_file, arch)
  (stage,) = (stage for stage in system.stages if stage.name == name)
  state = jax.eval_shape(lambda: first_state(system.init(KEY), stage))
  assert set(state['params']) == {'ar', 'dit', 'embed'}
  for tree in (state['opt_state']['mu'], state['opt_state']['nu'], state['ema']):
    assert not groups & set(tree)
  trained = {path for path in leaves_by_path(state['params']) if path.split('/')[0] not in groups}
  assert set(leaves_by_path(state['opt_state']['mu'])) == trained
  # The weight gradient of a frozen body would be 8 % and more.
  assert 0.98 < _executed_flops(system, stage) / step_flops(system, stage, 2).total < 1.02
