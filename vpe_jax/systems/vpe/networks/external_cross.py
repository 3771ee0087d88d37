"""External+VPE with cross-attention: `model.condition=cross`, outside the size-matched comparison.

The picture expert's row is `[boi] | time x`; the plan is not in it. Between self-attention and MLP
each of its layers looks at what the token expert knows of the plan: its final-norm hidden states at
the codes' own places, by keys and values of the layer's own (vpe_jax.models.transformer's
CrossAttention, whose output projection starts at zero, so that training begins with a picture that
no plan disturbs). The head sees the row alone.

  places          0  1   2   3  4  5
                 s1 s2 boi   t  x  y
      boi         c  c   1   0  0  0       c: seen by cross-attention
      t, x, y     c  c   1   1  1  1       1: by self-attention

The places are those that the row has with the plan in front, so the codes have an order there. They
are absent where the plan is dropped: cross-attention adds zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Params, Region
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified
from vpe_jax.systems.vpe.networks.external import External, Plan


def pair(model: Unified, codes: tuple[int, int]) -> External:
  """The two networks, joined as `model.condition` says; see External."""
  return (Crossed if model.config.condition == 'cross' else External)(model, codes)


class Crossed(External):
  """The two networks of one configuration; see External."""

  def prefill_null(
    self, params: Params, regions: Mapping[str, Region]
  ) -> tuple[mot.Cache | None, ...]:
    """As `prefill`, of a row whose plan is dropped: nothing sees what its memory holds."""
    first, last = self.codes
    shape = (regions['prefix'].ids.shape[0], last - first, self.model.config.ar.width)
    nothing = jnp.zeros(shape, self.model.dtype)
    plan = Plan(nothing, None, None, jnp.zeros((shape[0], 1), jnp.int32))
    return self.prefill(params, plan, regions)

  def _told(self, params: Params, plan: Plan, prefix: Region) -> tuple[mot.Stream, int]:
    """[boi], and the plan as each layer's cross-attention looks at it."""
    codes = jax.tree.map(lambda leaf: leaf[:, : plan.hidden.shape[1]], prefix)
    memory = self.model.remember(params, mot.Stream(plan.hidden, codes.positions, codes.visibility))
    boi = self._stored(prefix)
    x = self.rows(params, boi.ids)
    return mot.Stream(x, boi.positions, boi.visibility, memory=memory), 0

  def _stored(self, prefix: Region) -> Region:
    """The prefix without the codes' places."""
    first, last = self.codes
    return jax.tree.map(lambda leaf: leaf[:, last - first :], prefix)
