"""The description of a package of systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Package:
  """Systems of a package, and its additions to the command-line tools, as module paths.

  Modules are imported on first use.

  Attributes:
    systems: name in `config.system` -> module with `ModelConfig`, `Sampling` and `build`.
    sample_options: modules that add flags to vpe_jax.sample. Each has `define()`, which defines the
      flags, and `requested()`, which returns None if none of them is set, else a request with
      `prompts_optional`, `with_prompts`, `count`, `generate` and `save` (see vpe_jax.sample).
    evaluators: name -> `module:Class` of evaluators (vpe_jax.evaluation).
    releases: family of a published generator -> `module:NAME` of its Release.
  """

  systems: Mapping[str, str]
  sample_options: tuple[str, ...] = ()
  evaluators: Mapping[str, str] = dataclasses.field(default_factory=dict)
  releases: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Release:
  """Everything except the weights that vpe_jax.convert needs to import a published generator.

  Attributes:
    codec: family of the codec that decodes its images.
    codec_source: hub id of the codec's published weights; empty if they are not on the hub.
    codec_files: names of these weights, for the error if they are missing.
    tokenizer: function (network sizes) -> default of `data.tokenizer`.
    config: function (network sizes, codec sizes, source of the codec's weights, `data.tokenizer`)
      -> config of the run as nested dicts.
    sizes: function (vpe_jax.config.Config of a run) -> sizes of the run's network as those of this
      published family; None if the run's network is of another kind.
  """

  codec: str
  codec_source: str
  codec_files: str
  tokenizer: Callable[[Any], str]
  config: Callable[[Any, Any, str, str], dict[str, Any]]
  sizes: Callable[[Any], Any]
