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

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array, Params, Region
from vpe_jax.models import mot
from vpe_jax.models.external import External, Plan, joined
from vpe_jax.models.unified import Unified, row_visibility


def pair(model: Unified, codes: tuple[int, int]) -> External:
  """The two networks, joined as `model.condition` says; see External."""
  return (Crossed if model.config.condition == 'cross' else External)(model, codes)


class Crossed(External):
  """The two networks of one configuration; see External."""

  def __call__(
    self,
    params: Params,
    plan: Plan,
    regions: Mapping[str, Region],
    latents: Array,
    clock: Array,
  ) -> Array:
    """The picture expert over its whole row, as in training; see External.__call__."""
    boi, memory = self._told_apart(params, plan, regions['prefix'])
    picture, condition = self.model.picture_stream(params, latents, clock, regions['dit'])
    row = dataclasses.replace(joined(boi, picture), memory=memory)
    hidden = self.model.backbone(params, {'dit': row})[0]['dit']
    count = boi.x.shape[1]
    streams = {
      'prefix': dataclasses.replace(boi, x=hidden[:, :count]),
      'dit': dataclasses.replace(picture, x=hidden[:, count:], condition=condition),
    }
    rows, _ = self.model.head(params, streams)
    return self.model.velocity(params, rows['dit'], condition)

  def prefill(
    self, params: Params, plan: Plan, regions: Mapping[str, Region]
  ) -> tuple[mot.Cache, ...]:
    """The caches of body and head, and what cross-attention looks at in all flow steps."""
    boi, memory = self._told_apart(params, plan, regions['prefix'])
    own = self._own(regions['prefix'])
    body, head = self.model.caches(params, row_visibility({'prefix': own, 'dit': regions['dit']}))
    told = dataclasses.replace(boi, memory=memory)
    hidden, body = self.model.backbone(params, {'dit': told}, body)
    stream = dataclasses.replace(boi, x=hidden['dit'])
    return body, self.model.head(params, {'prefix': stream}, head)[1], memory

  def prefill_null(self, params: Params, regions: Mapping[str, Region]) -> tuple[mot.Cache, ...]:
    """As `prefill`, of a row whose plan is dropped: nothing sees what its memory holds."""
    first, last = self.codes
    shape = (regions['prefix'].ids.shape[0], last - first, self.model.config.ar.width)
    nothing = jnp.zeros(shape, self.model.dtype)
    plan = Plan(nothing, None, None, jnp.zeros((shape[0], 1), jnp.int32))
    return self.prefill(params, plan, regions)

  def _told_apart(self, params: Params, plan: Plan, prefix: Region) -> tuple[mot.Stream, mot.Cache]:
    """[boi] as the picture expert takes it, and the plan as its cross-attention does."""
    codes = jax.tree.map(lambda leaf: leaf[:, : plan.hidden.shape[1]], prefix)
    told = mot.Stream(plan.hidden, codes.positions, codes.visibility)
    own = self._own(prefix)
    boi = mot.Stream(self.rows(params, own.ids), own.positions, own.visibility)
    return boi, self.model.remember(params, told)

  def _own(self, prefix: Region) -> Region:
    """The prefix without the codes' places."""
    first, last = self.codes
    return jax.tree.map(lambda leaf: leaf[:, last - first :], prefix)
