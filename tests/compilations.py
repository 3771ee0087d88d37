"""Observes compilations: names of the programs that a block compiles, and those in the cache."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_HIT = '/jax/compilation_cache/cache_hits'
_COMPILED = '/jax/core/compile/backend_compile_duration'


@dataclasses.dataclass
class Compilations:
  """Names of jitted functions.

  Attributes:
    all: those that XLA compiled or that came from JAX's compilation cache on disk.
    cached: those from the cache.
  """

  all: list[str] = dataclasses.field(default_factory=list)
  cached: list[str] = dataclasses.field(default_factory=list)


_active: list[Compilations] = []
_hits: list[str] = []


def _on_event(event: str, **_: Any) -> None:
  if event == _HIT:
    _hits.append(event)


def _on_duration(event: str, _: float, **details: Any) -> None:
  if event != _COMPILED:
    return
  name = details['fun_name'].removeprefix('jit(').removesuffix(')').removeprefix('jit_')
  for compilations in _active:
    compilations.all.append(name)
    compilations.cached += [name] if _hits else []
  _hits.clear()


# JAX has no public way to remove a listener, so these stay and do nothing outside of a block.
jax.monitoring.register_event_listener(_on_event)
jax.monitoring.register_event_duration_secs_listener(_on_duration)


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
  """Observes a block."""
  _active.append(Compilations())
  _hits.clear()
  try:
    yield _active[-1]
  finally:
    _active.pop()
