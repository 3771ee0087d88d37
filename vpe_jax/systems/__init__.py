"""Systems: a package for each way of joining a language model to an image generator.

Each package in this folder has a PACKAGE, which names its systems and its additions to the front
doors. A system's module has a `ModelConfig` and a `Sampling` (the types of the config's sections
`model` and `sample`), and `build(config)`, which makes a vpe_jax.contracts.System.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from vpe_jax import rng
from vpe_jax.config import SampleConfig, did_you_mean, from_dict
from vpe_jax.contracts import System, UserError
from vpe_jax.systems.package import Package, Release


@functools.cache
def packages() -> dict[str, Package]:
  """The packages of this folder, by name."""
  names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
  return {name: importlib.import_module(f'{__name__}.{name}').PACKAGE for name in names}


def known() -> dict[str, str]:
  """Name of each system -> its module."""
  return {name: path for package in packages().values() for name, path in package.systems.items()}


def sample_options() -> list[ModuleType]:
  """Modules that add flags to vpe_jax.sample; see Package."""
  paths = [path for package in packages().values() for path in package.sample_options]
  return [importlib.import_module(path) for path in paths]


def releases() -> dict[str, Release]:
  """The published generators that are imported as runs, by family."""
  paths = [entry for package in packages().values() for entry in package.releases.items()]
  split = {family: path.partition(':') for family, path in paths}
  return {
    family: getattr(importlib.import_module(module), name)
    for family, (module, _, name) in split.items()
  }


def sampling_sections() -> dict[str, type[SampleConfig]]:
  """The type of the `sample` section of each system."""
  return {name: importlib.import_module(path).Sampling for name, path in known().items()}


def model_section(name: str) -> type:
  """The type of the `model` section of a system.

  Raises:
    UserError: the system is unknown.
  """
  return _module(name).ModelConfig


def build(values: Mapping[str, Any]) -> System:
  """Builds the system of a config (nested dicts).

  Raises:
    UserError: the system is unknown, or the config has a wrong key or value.
  """
  module = _module(values.get('system'))
  config = from_dict(values, module.ModelConfig, module.Sampling)
  rng.check_seed(config.seed)
  system = module.build(config)
  averages = lambda index: bool(config.optim_of(index).ema)
  system.stages = tuple(
    dataclasses.replace(stage, ema=stage.ema and averages(index))
    for index, stage in enumerate(system.stages)
  )
  return system


def _module(name: Any) -> ModuleType:
  modules = known()
  if str(name) not in modules:
    raise UserError(f"config.system is '{name}'{did_you_mean(str(name), modules)}")
  return importlib.import_module(modules[name])
