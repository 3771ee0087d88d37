"""Model FLOPs of every config, and visible pairs of attention kernels, against recorded figures.

`model_flops.json` holds, for one example of each stage of each config: `flops`, forward and
backward; `tokens`; and for the size `paper` the FLOPs of attention between visible pairs in one
forward pass, `attention`, of which `frozen_attention` has no backward pass. They come from formulas
written by hand, which counted no padding of convolutions (`codec`) and no resampling of images
(`siglip:debug`): those figures are traced.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from vpe_jax import rng, systems
from vpe_jax.contracts import System
from vpe_jax.ops.attention import chooser
from vpe_jax.training.model_flops import step_flops

RECORDED = json.loads(Path(__file__).with_suffix('').with_name('model_flops.json').read_text())
PAPER = [name for name in RECORDED if ':paper' in name and 'single' not in name]
IMAGES = 16
# The other configs are variants.
QUICK = (
  'c2i_continuous:tiny,vpe=true', 'c2i_discrete:tiny,vpe=true', 'codec:debug,stage=image',
  'codec:debug,stage=image_codes', 'codec:debug,stage=feature_vq', 'edit:tiny,arch=internal',
  'siglip:evaluator_network', 't2i:paper', 't2i:tiny {"data.encode": "online"}',
  't2i:tiny,arch=external',
)  # fmt: skip


def _quick(names: Iterable[str], quick: Collection[str]) -> list[Any]:
  """Test parameters: all names but the quick ones are marked exhaustive."""
  exhaustive = lambda name: pytest.param(name, marks=pytest.mark.exhaustive)
  return [name if name in quick else exhaustive(name) for name in names]


def _system(name: str, **data) -> System:
  """The system of a name in the table: CONFIG:ARGUMENT, and changes in JSON."""
  config_name, _, changes = name.partition(' ')
  module, argument = config_name.split(':')
  config = importlib.import_module(f'configs.{module}').get_config(argument)
  config.update_from_flattened_dict(json.loads(changes or '{}'))
  config.data.update(data)
  return systems.build(config.to_dict())


@pytest.mark.parametrize('name', _quick(RECORDED, QUICK))
def test_figures_of_configs(name):
  system = _system(name)
  assert [stage.name for stage in system.stages] == sorted(RECORDED[name], key=_order(system))
  for stage in system.stages:
    recorded = RECORDED[name][stage.name]
    assert system.tokens(stage) == recorded['tokens']
    flops = step_flops(system, stage, IMAGES)
    assert flops.total / IMAGES == pytest.approx(recorded['flops'], rel=0.02)
    assert flops.forward < flops.total < 3 * flops.forward + 1


def _order(system: System):
  return [stage.name for stage in system.stages].index


@pytest.mark.parametrize('name', _quick(PAPER, ('t2i:paper,arch=external',)))
def test_attention_kernels_count_visible_pairs(name, monkeypatch):
  monkeypatch.setattr(chooser, 'device', lambda: ('tpu', 'TPU v5p'))
  system = _system(name, encode='cached')
  for stage in system.stages:
    flops = step_flops(system, stage, IMAGES, rng.run_key(0))
    recorded = RECORDED[name][stage.name]
    visible = sum(kernel.calls * kernel.flops() for kernel in flops.kernels) / IMAGES
    trained = sum(kernel.trained * kernel.flops() for kernel in flops.kernels) / IMAGES
    # Recorded figures count padding to a multiple of 16, although padding attends to nothing.
    assert 0.97 < visible / recorded['attention'] <= 1
    assert 0.97 < trained / (recorded['attention'] - recorded['frozen_attention']) <= 1
    # With one token before a bidirectional image, almost all pairs are visible.
    limit = 1.0 if name == 'c2i_continuous:paper,vpe=false' else 0.9
    assert visible < limit * _dense(flops.kernels)


def _dense(kernels) -> float:
  """FLOPs of all calls if every pair were visible, for one example."""
  dense_flops = lambda kernel: 4 * kernel.shape[1] * kernel.keys * kernel.shape[2] * kernel.shape[3]
  return sum(kernel.calls * dense_flops(kernel) for kernel in kernels)


def test_frozen_parameters_and_logged_terms_cost_no_backward_pass():
  """In `render` only the diffusion expert trains, and the loss of tokens is only logged."""
  system = _system('t2i:tiny,arch=external')
  plan, render = (step_flops(system, stage, IMAGES) for stage in system.stages)
  assert plan.backward == pytest.approx(2 * plan.forward, rel=0.01)
  assert render.backward < 1.6 * render.forward


def test_flops_scale_with_the_batch_and_do_not_depend_on_remat():
  config = importlib.import_module('configs.t2i').get_config('debug')
  figures = []
  for remat in ('none', 'full', 'attention'):
    config.remat = remat
    system = systems.build(config.to_dict())
    figures.append([step_flops(system, stage, 8).total for stage in system.stages])
  assert figures[0] == figures[1] == figures[2]
  assert step_flops(system, system.stages[0], 16).total == 2 * figures[0][0]
