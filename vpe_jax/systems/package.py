"""The description of a package of systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


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
    releases: family of a published generator -> `module:NAME` of its Release.
  """

  systems: Mapping[str, str]
  sample_options: tuple[str, ...] = ()
  evaluators: Mapping[str, str] = dataclasses.field(default_factory=dict)
  releases: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Release:
  """A published generator as a run: what vpe_jax.convert needs besides its weights.

  Attributes:
    codec: family of the codec that decodes its images.
    codec_source: published weights of the codec; empty if they have no hub id.
    codec_files: names of these weights, for the error if they are missing.
    tokenizer: default of `data.tokenizer`, from the sizes of the network.
    config: config of the run as nested dicts, from the sizes of the network and of the codec, the
      source of the codec's weights, and `data.tokenizer`.
    sizes: sizes of the published network with which a run (vpe_jax.config.Config) agrees; None if
      its network is another.
  """

  codec: str
  codec_source: str
  codec_files: str
  tokenizer: Callable[[Any], str]
  config: Callable[[Any, Any, str, str], dict[str, Any]]
  sizes: Callable[[Any], Any]
