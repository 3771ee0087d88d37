"""vpe_jax: image generation by vision-language models, in JAX, for TPU pods."""

from __future__ import annotations

import sys
from typing import Any

from vpe_jax import interrupts

__version__ = '0.1.0'

# `python -m vpe_jax.NAME` imports this package first, and libraries that take seconds after it.
if sys.argv[:1] == ['-m'] and any(word.startswith('vpe_jax.') for word in sys.orig_argv):
  interrupts.exit_at_once()


def __getattr__(name: str) -> Any:
  """Imports `vpe_jax.Generator` on first access, so that `import vpe_jax` doesn't import JAX."""
  if name == 'Generator':
    from vpe_jax.generator import Generator

    return Generator
  raise AttributeError(f"module 'vpe_jax' has no attribute {name!r}")
