"""vpe_jax: image generation by vision-language models, in JAX, for TPU pods."""

from __future__ import annotations

from typing import Any

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  """Imports `vpe_jax.Generator` on first access, so that `import vpe_jax` doesn't import JAX."""
  if name == 'Generator':
    from vpe_jax.generator import Generator

    return Generator
  raise AttributeError(f"module 'vpe_jax' has no attribute {name!r}")
