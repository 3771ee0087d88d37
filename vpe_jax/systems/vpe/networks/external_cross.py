"""ExternalNetworks+VPE with cross-attention: `model.condition=cross`.

It adds parameters, so it is no part of the size-matched comparison. The diffusion expert's sequence
is `[boi] | time x`, without the visual prompt. Between self-attention and MLP, each of its layers
attends to the AR expert's final-norm hidden states of the codes (CrossAttention of
vpe_jax.models.transformer). The output projection of cross-attention starts at zero, so at first
images don't depend on the visual prompt. The head reads only the diffusion expert's sequence.

  positions       0  1   2   3  4  5
                 s1 s2 boi   t  x  y
      boi         c  c   1   0  0  0       c: seen by cross-attention
      t, x, y     c  c   1   1  1  1       1: seen by self-attention

Rotary positions are those of a sequence with the codes in front; cross-attention uses them, too.
Codes are absent where the visual prompt is dropped: cross-attention then adds zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Params, Region
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified
from vpe_jax.systems.vpe.networks.external import ExternalNetworks, PromptFeatures


def pair(model: Unified, codes: tuple[int, int]) -> ExternalNetworks:
  """The networks of both experts, joined as `model.condition` says; see ExternalNetworks."""
  crosses = model.config.condition == 'cross'
  return (CrossAttentionNetworks if crosses else ExternalNetworks)(model, codes)


class CrossAttentionNetworks(ExternalNetworks):
  """ExternalNetworks, with cross-attention from the diffusion expert to the codes."""

  def prefill_null(
    self, params: Params, regions: Mapping[str, Region]
  ) -> tuple[mot.Cache | None, ...]:
    """As `prefill`, without the visual prompt: no token attends to the codes."""
    first, last = self.codes
    shape = (regions['prefix'].ids.shape[0], last - first, self.model.config.ar.width)
    hidden = jnp.zeros(shape, self.model.dtype)
    features = PromptFeatures(hidden, None, None, jnp.zeros((shape[0], 1), jnp.int32))
    return self.prefill(params, features, regions)

  def _prefix_stream(
    self, params: Params, features: PromptFeatures, prefix: Region
  ) -> tuple[mot.Stream, int]:
    """[boi], with the codes as the context of cross-attention."""
    codes = jax.tree.map(lambda leaf: leaf[:, : features.hidden.shape[1]], prefix)
    stream = mot.Stream(features.hidden, codes.positions, codes.visibility)
    context = self.model.context_kv(params, stream)
    boi = self._prefix_region(prefix)
    x = self.embed_text(params, boi.ids)
    return mot.Stream(x, boi.positions, boi.visibility, context=context), 0

  def _prefix_region(self, prefix: Region) -> Region:
    """The prefix without the codes."""
    first, last = self.codes
    return jax.tree.map(lambda leaf: leaf[:, last - first :], prefix)
