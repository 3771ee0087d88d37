"""Two experts with a sequence each: one samples the visual prompt, the other renders it.

External+VPE (arXiv 2606.04457, Table 4). The parameter tree is that of `arch=internal`, and no
parameter trains for both experts. The AR expert has the sequence `[bos] text [bot] s [eot]`. The
diffusion expert has `s [boi] | time x` (diffusion_sequence of vpe_jax.systems.vpe.layouts shows its
mask). Its slots of codes hold features of the AR expert, which depend on `condition`:

  `prefix`: the AR expert's final-norm hidden states at the codes enter the first layer of the
    diffusion expert like embeddings, and go through all of its layers.
  `keys`: the AR expert's keys and values of the codes replace the diffusion expert's own in each
    layer: Eq. 4, restricted to the codes. So no layer gets hidden states of an unfamiliar scale.

In both, the head reads states of the codes without modulation: with `prefix` the diffusion expert's
hidden states, with `keys` those of the AR expert, as in `internal`. A third `condition`, `cross`,
adds parameters: systems/vpe/networks/external_cross.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array, Params, Region, concatenate
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified, sequence_visibility


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptFeatures:
  """Visual-prompt features for the diffusion expert; no gradient flows back through them.

  Attributes:
    hidden: final-norm hidden states of the codes [B, P, D].
    keys: the AR expert's keys of the codes in each layer, laid out as in mot.Cache; None unless
      the condition is `keys`.
    values: the AR expert's values, likewise.
    position: rotary position [B, 1] of the first code in the AR expert's sequence if the condition
      is `keys`, else 0.
  """

  hidden: Array
  keys: Any
  values: Any
  position: Array


@dataclasses.dataclass(frozen=True)
class ExternalNetworks:
  """The networks of both experts, and the features that the AR expert passes on.

  Attributes:
    model: both experts' networks; its parameter tree is that of `internal`.
    codes: first slot of the codes in the AR expert's sequence, and the slot after their last.
  """

  model: Unified
  codes: tuple[int, int]

  @property
  def condition(self) -> str:
    """How the visual prompt conditions the diffusion expert."""
    return self.model.config.condition

  def read(
    self, params: Params, region: Region, stream: mot.Stream
  ) -> tuple[Array, PromptFeatures]:
    """Runs the AR expert over its whole sequence.

    Args:
      params: parameters of both experts.
      region: the AR expert's sequence.
      stream: input of the AR expert: embeddings of the region's ids, and the source image of an
        edit.

    Returns:
      Final-norm hidden states [B, L, D], and the features of the codes.
    """
    cache = None
    if self.condition == 'keys':
      cache, _ = self.model.caches(params, region.visibility)
    hidden, cache = self.model.backbone(params, {'ar': stream}, cache)
    return hidden['ar'], self.features(region, hidden['ar'], cache)

  def features(self, region: Region, hidden: Array, cache: mot.Cache | None) -> PromptFeatures:
    """The codes' features, cut out of the AR expert's sequence.

    Args:
      region: the AR expert's sequence.
      hidden: final-norm hidden states [B, L, D] of its first L slots, which include all codes.
      cache: the AR expert's keys and values; read only if the condition is `keys`.
    """
    first, last = self.codes
    keys = values = None
    position = jnp.zeros_like(region.positions[:, :1])
    if self.condition == 'keys':
      cut = lambda leaf: jax.lax.slice_in_dim(leaf, first, last, axis=leaf.ndim - 3)
      keys, values = jax.tree.map(cut, (cache.k, cache.v))
      position = region.positions[:, first : first + 1]
    features = PromptFeatures(hidden[:, first:last], keys, values, position)
    # The experts train separately: no gradient of the flow loss reaches the AR expert.
    return jax.lax.stop_gradient(features)

  def __call__(
    self,
    params: Params,
    features: PromptFeatures,
    regions: Mapping[str, Region],
    latents: Array,
    clock: Array,
  ) -> Array:
    """Runs the diffusion expert over its whole sequence, as in training.

    Args:
      params: parameters of both experts.
      features: see `read`.
      regions: `prefix` (the codes and [boi]) and `dit` of the diffusion expert's sequence.
      latents: noisy latents [B, h, w, C].
      clock: Show-o2's time [B], 0 at noise and 1 at data.

    Returns:
      Show-o2's velocity [B, h, w, C] float32.
    """
    regions = self.shifted(features, regions)
    prefix, at = self._prefix_stream(params, features, regions['prefix'])
    image, condition = self.model.image_stream(params, latents, clock, regions['dit'])
    cache = self._prefix_cache(features, regions)
    hidden, _ = self.model.backbone(params, {'dit': _joined(prefix, image)}, cache, at)
    count = prefix.x.shape[1]
    streams = {
      'prefix': self._head_prefix(features, regions['prefix'], hidden['dit'][:, :count]),
      'dit': dataclasses.replace(image, x=hidden['dit'][:, count:], condition=condition),
    }
    out, _ = self.model.head(params, streams)
    return self.model.velocity(params, out['dit'], condition)

  def prefill(
    self, params: Params, features: PromptFeatures, regions: Mapping[str, Region]
  ) -> tuple[mot.Cache | None, ...]:
    """The prefix KV caches that all flow steps share.

    Args:
      params: parameters of both experts.
      features: see `read`.
      regions: as `shifted` returns them.

    Returns:
      The caches of body and head, and the keys and values of cross-attention, or None.
    """
    prefix, at = self._prefix_stream(params, features, regions['prefix'])
    key = sequence_visibility({**regions, 'prefix': self._prefix_region(regions['prefix'])})
    body, head = self.model.caches(params, key)
    cache = self._prefix_cache(features, regions) or body
    hidden, body = self.model.backbone(params, {'dit': prefix}, cache, at)
    stream = self._head_prefix(features, regions['prefix'], hidden['dit'])
    return body, self.model.head(params, {'prefix': stream}, head)[1], prefix.context

  def prefill_null(self, params: Params, regions: Mapping[str, Region]) -> tuple[mot.Cache, ...]:
    """As `prefill`, for a sequence without the visual prompt: only `[boi]`, at the front."""
    at = self.codes[1] - self.codes[0]
    boi = jax.tree.map(lambda leaf: leaf[:, at : at + 1], regions['prefix'])
    absent = regions['prefix'].ids.shape[1] - 1
    rest = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, shape=(1, absent)), boi.visibility)
    key = concatenate([boi.visibility, rest, regions['dit'].visibility])
    body, head = self.model.caches(params, key)
    stream = mot.Stream(self.embed_text(params, boi.ids), boi.positions, boi.visibility)
    hidden, body = self.model.backbone(params, {'dit': stream}, body)
    stream = dataclasses.replace(stream, x=hidden['dit'])
    return body, self.model.head(params, {'prefix': stream}, head)[1]

  def shifted(self, features: PromptFeatures, regions: Mapping[str, Region]) -> dict[str, Region]:
    """The regions of the diffusion expert, moved to the rotary positions of `features.keys`.

    Attention depends only on differences of positions, which don't change: the codes, [boi], the
    time token and the image follow one another without gaps.
    """
    shift = lambda region: dataclasses.replace(
      region, positions=region.positions + features.position
    )
    return {name: shift(region) for name, region in regions.items()}

  def _prefix_stream(
    self, params: Params, features: PromptFeatures, prefix: Region
  ) -> tuple[mot.Stream, int]:
    """The prefix that runs through the diffusion expert's layers, and its first slot."""
    count = self.codes[1] - self.codes[0]
    at = count if self.condition == 'keys' else 0
    boi = self.embed_text(params, prefix.ids[:, count:])
    x = jnp.concatenate([features.hidden[:, at:], boi], 1)
    own = jax.tree.map(lambda leaf: leaf[:, at:], prefix)
    return mot.Stream(x, own.positions, own.visibility), at

  def _prefix_region(self, prefix: Region) -> Region:
    """The part of the prefix that the diffusion expert's sequence contains."""
    return prefix

  def _head_prefix(self, features: PromptFeatures, prefix: Region, hidden: Array) -> mot.Stream:
    """The head's input for the prefix.

    `hidden` are the states of the prefix's last tokens; `features` has those of earlier tokens.
    """
    region = self._prefix_region(prefix)
    count = region.ids.shape[1] - hidden.shape[1]
    x = jnp.concatenate([features.hidden[:, :count], hidden], 1)
    return mot.Stream(x, region.positions, region.visibility)

  def embed_text(self, params: Params, ids: Array) -> Array:
    """Embeddings [B, L, D] of text ids ([boi]); no gradient flows to the embedding table."""
    x = jnp.take(params['embed']['text'], ids, axis=0)
    return jax.lax.stop_gradient(x).astype(self.model.dtype)

  def _prefix_cache(
    self, features: PromptFeatures, regions: Mapping[str, Region]
  ) -> mot.Cache | None:
    """The body's cache with the AR expert's keys and values of the codes; None without them."""
    if features.keys is None:
      return None
    key = sequence_visibility(regions)
    rest = key.order.shape[1] - features.hidden.shape[1]

    def longer(leaf: Array) -> Array:
      sides = [(0, 0)] * leaf.ndim
      sides[-3] = (0, rest)
      return jnp.pad(leaf, sides)

    return mot.Cache(*jax.tree.map(longer, (features.keys, features.values)), key)


def _joined(prefix: mot.Stream, image: mot.Stream) -> mot.Stream:
  """Two parts of one expert's sequence as one stream, so that weights are read once."""
  parts = [(s.x, s.positions, s.visibility) for s in (prefix, image)]
  return mot.Stream(*concatenate(parts), context=prefix.context)
