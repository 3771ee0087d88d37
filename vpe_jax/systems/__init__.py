"""Systems: one file per way of joining a language model to an image generator.

Each module has a `ModelConfig` (the type of the config's `model` section) and a `System` that
follows vpe_jax.contracts.System.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from vpe_jax.config import from_dict, nearest
from vpe_jax.contracts import System, UserError

SYSTEMS = {
  't2i': 'vpe_jax.systems.t2i',
  'edit': 'vpe_jax.systems.editing',
  'siglip': 'vpe_jax.systems.siglip',
  'codec': 'vpe_jax.systems.codec',
  'c2i_discrete': 'vpe_jax.systems.c2i_discrete',
  'c2i_continuous': 'vpe_jax.systems.c2i_continuous',
}


def build(values: Mapping[str, Any]) -> System:
  """The system that a config (as plain nested dicts) asks for.

  Raises:
    UserError: the config names no known system, or has a wrong key or value.
  """
  name = values.get('system')
  if name not in SYSTEMS:
    raise UserError(f"config.system is '{name}'{nearest(str(name), SYSTEMS)}")
  module = importlib.import_module(SYSTEMS[name])
  config = from_dict(values, module.ModelConfig)
  system = module.System(config)
  averages = lambda index: bool(config.optim.of(index).ema)
  system.stages = tuple(
    dataclasses.replace(stage, ema=stage.ema and averages(index))
    for index, stage in enumerate(system.stages)
  )
  return system
