"""vpe_jax: image generation by vision-language models, in JAX, for TPU pods."""

from __future__ import annotations

from typing import Any

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  """`vpe_jax.Generator`, imported when it is asked for: plain `import vpe_jax` stays light."""
  if name == 'Generator':
    from vpe_jax.generator import Generator

    return Generator
  raise AttributeError(f"module 'vpe_jax' has no attribute {name!r}")
