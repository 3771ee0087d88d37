"""Two experts that attend apart: one writes the plan, the other renders what the first made of it.

External+VPE (arXiv 2606.04457, Table 4): the parameters are those of `arch=internal`, not one more
or less, and the experts share none that trains. The token expert has the row `[bos] text [bot] s
[eot]`. The picture expert has `s [boi] | time x` (diffusion_sequence of
vpe_jax.systems.vpe.layouts draws its mask), where the codes' places hold what the token expert
knows of the plan, by `condition`:

  `prefix`: its final-norm hidden states at the codes' own places (input = that code) enter the
    picture expert's first layer like embeddings, and go through all of its layers.
  `keys`: its keys and values of the codes stand in each layer in the place of the picture expert's
    own: Eq. 4, restricted to the codes. So no hidden state enters layers that never saw its scale.

In both, what stands at the codes' places after the last layer goes through the head as rows that
are not modulated; with `keys` these are the token expert's hidden states, as in `internal`. A third
`condition`, `cross`, has parameters of its own: systems/vpe/networks/external_cross.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array, Params, Region, concatenate
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified, row_visibility


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """Visual-prompt features for the renderer; no gradient flows back through them.

  Attributes:
    hidden: final-norm hidden states at the codes' places [B, P, D].
    keys: its keys there in each layer, laid out as those of mot.Cache; None but for `keys`.
    values: its values, alike.
    start: rotary position [B, 1] of the first code that `keys` are turned by, else 0.
  """

  hidden: Array
  keys: Any
  values: Any
  start: Array


@dataclasses.dataclass(frozen=True)
class External:
  """The two networks of one configuration, and what passes from one to the other.

  Attributes:
    model: both experts' parts; its parameter tree is that of `internal`.
    codes: first slot of the codes in the token expert's row, and the slot after their last.
  """

  model: Unified
  codes: tuple[int, int]

  @property
  def condition(self) -> str:
    """How the plan reaches the picture expert."""
    return self.model.config.condition

  def read(self, params: Params, region: Region, stream: mot.Stream) -> tuple[Array, Plan]:
    """The token expert over its whole row: final-norm hidden states [B, L, D], and the plan.

    `stream` is its input: the region's ids, and what an edit adds to them.
    """
    cache = None
    if self.condition == 'keys':
      cache, _ = self.model.caches(params, region.visibility)
    hidden, cache = self.model.backbone(params, {'ar': stream}, cache)
    return hidden['ar'], self.plan(region, hidden['ar'], cache)

  def plan(self, region: Region, hidden: Array, cache: mot.Cache | None) -> Plan:
    """Cuts the codes out of the token expert's row.

    Args:
      region: the row.
      hidden: final-norm hidden states of at least its slots up to the last code [B, L, D].
      cache: the token expert's keys and values; read by `keys` alone.
    """
    first, last = self.codes
    keys = values = None
    start = jnp.zeros_like(region.positions[:, :1])
    if self.condition == 'keys':
      cut = lambda leaf: jax.lax.slice_in_dim(leaf, first, last, axis=leaf.ndim - 3)
      keys, values = jax.tree.map(cut, (cache.k, cache.v))
      start = region.positions[:, first : first + 1]
    plan = Plan(hidden[:, first:last], keys, values, start)
    # Two networks that share nothing: the flow loss never reaches what wrote the plan.
    return jax.lax.stop_gradient(plan)

  def __call__(
    self,
    params: Params,
    plan: Plan,
    regions: Mapping[str, Region],
    latents: Array,
    clock: Array,
  ) -> Array:
    """The picture expert over its whole row, as in training.

    Args:
      params: of both experts.
      plan: see `read`.
      regions: `prefix` (the codes' places and [boi]) and `dit` of the picture expert's row.
      latents: noisy [B, h, w, C].
      clock: Show-o2's [B], 0 at noise and 1 at data.

    Returns:
      Show-o2's velocity [B, h, w, C] float32.
    """
    regions = self.placed(plan, regions)
    told, at = self._told(params, plan, regions['prefix'])
    picture, condition = self.model.picture_stream(params, latents, clock, regions['dit'])
    cache = self._held(plan, regions)
    hidden, _ = self.model.backbone(params, {'dit': _joined(told, picture)}, cache, at)
    count = told.x.shape[1]
    streams = {
      'prefix': self._entering(plan, regions['prefix'], hidden['dit'][:, :count]),
      'dit': dataclasses.replace(picture, x=hidden['dit'][:, count:], condition=condition),
    }
    rows, _ = self.model.head(params, streams)
    return self.model.velocity(params, rows['dit'], condition)

  def prefill(
    self, params: Params, plan: Plan, regions: Mapping[str, Region]
  ) -> tuple[mot.Cache | None, ...]:
    """The caches of body and head, with all in them that flow steps share; `regions` placed.

    And what cross-attention looks at in all flow steps, or None.
    """
    told, at = self._told(params, plan, regions['prefix'])
    key = row_visibility({**regions, 'prefix': self._stored(regions['prefix'])})
    body, head = self.model.caches(params, key)
    hidden, body = self.model.backbone(params, {'dit': told}, self._held(plan, regions) or body, at)
    stream = self._entering(plan, regions['prefix'], hidden['dit'])
    return body, self.model.head(params, {'prefix': stream}, head)[1], told.memory

  def prefill_null(self, params: Params, regions: Mapping[str, Region]) -> tuple[mot.Cache, ...]:
    """As `prefill`, of a row whose plan is dropped: `[boi]` alone, at the front."""
    at = self.codes[1] - self.codes[0]
    boi = jax.tree.map(lambda leaf: leaf[:, at : at + 1], regions['prefix'])
    absent = regions['prefix'].ids.shape[1] - 1
    rest = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, shape=(1, absent)), boi.visibility)
    key = concatenate([boi.visibility, rest, regions['dit'].visibility])
    body, head = self.model.caches(params, key)
    stream = mot.Stream(self.rows(params, boi.ids), boi.positions, boi.visibility)
    hidden, body = self.model.backbone(params, {'dit': stream}, body)
    stream = dataclasses.replace(stream, x=hidden['dit'])
    return body, self.model.head(params, {'prefix': stream}, head)[1]

  def placed(self, plan: Plan, regions: Mapping[str, Region]) -> dict[str, Region]:
    """The row where the codes keep the rotary positions that `keys` were turned by.

    Only distances matter to attention, and they stay as they are: each code, [boi], the time token
    and the picture follow one another without gaps.
    """
    move = lambda region: dataclasses.replace(region, positions=region.positions + plan.start)
    return {name: move(region) for name, region in regions.items()}

  def _told(self, params: Params, plan: Plan, prefix: Region) -> tuple[mot.Stream, int]:
    """The prefix as the picture expert's layers take it, and its first slot in the row."""
    count = self.codes[1] - self.codes[0]
    at = count if self.condition == 'keys' else 0
    x = jnp.concatenate([plan.hidden[:, at:], self.rows(params, prefix.ids[:, count:])], 1)
    own = jax.tree.map(lambda leaf: leaf[:, at:], prefix)
    return mot.Stream(x, own.positions, own.visibility), at

  def _stored(self, prefix: Region) -> Region:
    """Of the prefix, what stands in the picture expert's row."""
    return prefix

  def _entering(self, plan: Plan, prefix: Region, hidden: Array) -> mot.Stream:
    """The prefix as the head takes it: `hidden` of its last tokens, behind those held."""
    stored = self._stored(prefix)
    held = stored.ids.shape[1] - hidden.shape[1]
    rows = jnp.concatenate([plan.hidden[:, :held], hidden], 1)
    return mot.Stream(rows, stored.positions, stored.visibility)

  def rows(self, params: Params, ids: Array) -> Array:
    """Embeddings [B, L, D] of text ids: [boi], whose row the picture expert only reads."""
    rows = jnp.take(params['embed']['text'], ids, axis=0)
    return jax.lax.stop_gradient(rows).astype(self.model.dtype)

  def _held(self, plan: Plan, regions: Mapping[str, Region]) -> mot.Cache | None:
    """The body's cache with the token expert's keys and values at the codes' places."""
    if plan.keys is None:
      return None
    key = row_visibility(regions)
    rest = key.order.shape[1] - plan.hidden.shape[1]

    def longer(leaf: Array) -> Array:
      sides = [(0, 0)] * leaf.ndim
      sides[-3] = (0, rest)
      return jnp.pad(leaf, sides)

    return mot.Cache(*jax.tree.map(longer, (plan.keys, plan.values)), key)


def _joined(told: mot.Stream, picture: mot.Stream) -> mot.Stream:
  """Two stretches of one expert's row as one: each layer's weights are read once."""
  parts = [(s.x, s.positions, s.visibility) for s in (told, picture)]
  return mot.Stream(*concatenate(parts), memory=told.memory)
