"""The description of a package of systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Package:
  """Systems of a package and its additions to the front doors, as module paths.

  Modules are imported on first use.

  Attributes:
    systems: name in `config.system` -> module with `ModelConfig`, `Sampling` and `build`.
    sample_options: modules that add flags to vpe_jax.sample. Each has `define()` and `requested()`,
      which returns None without any of its flags on the command line, else an object with
      `prompts_optional`, `with_prompts`, `count`, `generate` and `save` (see vpe_jax.sample).
    evaluators: name -> `module:Class` of evaluators (vpe_jax.evaluation).
  """

  systems: Mapping[str, str]
  sample_options: tuple[str, ...] = ()
  evaluators: Mapping[str, str] = dataclasses.field(default_factory=dict)
