"""The public attention call: picks an implementation, or runs the one that is named."""

from __future__ import annotations

from vpe_jax.config import nearest
from vpe_jax.contracts import Array, UserError, Visibility
from vpe_jax.ops.attention import reference

IMPLEMENTATIONS = {'reference': reference.attention}


def attention(
  q: Array,
  k: Array,
  v: Array,
  query: Visibility,
  key: Visibility,
  implementation: str | None = None,
) -> Array:
  """Mixed values [B, L, N, H] of grouped-query attention; see `reference.attention`.

  Raises:
    UserError: `implementation` names none that exists.
  """
  name = implementation or 'reference'
  if name not in IMPLEMENTATIONS:
    raise UserError(f"no attention implementation '{name}'{nearest(name, IMPLEMENTATIONS)}")
  return IMPLEMENTATIONS[name](q, k, v, query, key)[0]
