"""The description that a package of systems gives of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Package:
  """Systems of one package, and its additions to the front doors, as module paths.

  Modules are imported when they are used.

  Attributes:
    systems: name in `config.system` -> module with `ModelConfig`, `Sampling` and `build`.
    sample_options: modules that add flags to vpe_jax.sample. Each has `define()`, and
      `requested()`: None if none of its flags is given, else an object with `prompts_optional`,
      `with_prompts`, `count`, `generate` and `save` (vpe_jax.sample shows how they are called).
    evaluators: name -> `module:Class` of evaluators (vpe_jax.evaluation).
  """

  systems: Mapping[str, str]
  sample_options: tuple[str, ...] = ()
  evaluators: Mapping[str, str] = dataclasses.field(default_factory=dict)
