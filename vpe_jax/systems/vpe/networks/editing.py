"""The picture before an edit, among the tokens of a unified model (arXiv 2606.04457, App. C and D).

A second dual path, `ar/dual_path`, embeds its clean latents for the token expert, which stores them
in the sequence `[bos] [boi] time x_src [eoi] ...` (vpe_jax.systems.vpe.layouts.edit). It is clean,
so its clock is 1: its time token comes from the embedding that the picture's comes from, and the
head modulates its rows by the condition of that clock, as Show-o2's does pictures that it
understands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array, Params, Region
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified


@dataclasses.dataclass(frozen=True)
class Editor:
  """The network of one configuration, whose token rows have a picture before in them.

  Attributes:
    model: of a configuration with `references`.
    reference: first slot of the picture before in the token expert's region (its time token), and
      the slot after its last.
  """

  model: Unified
  reference: tuple[int, int]

  def token_stream(
    self, params: Params, region: Region, latents: Array
  ) -> tuple[mot.Stream, Array]:
    """The token expert's input, and the head's condition of the picture before.

    Args:
      params: of the model.
      region: its rows, or their slots up to some place behind the picture before.
      latents: of the picture before [B, h, w, C].
    """
    stream = self.model.token_stream(params, region)
    condition, token = self.clean(params, latents.shape[0])
    seen = self.model.picture_tokens(params['ar'], token, latents)
    first, last = self.reference
    x = jnp.concatenate([stream.x[:, :first], seen, stream.x[:, last:]], 1)
    return dataclasses.replace(stream, x=x), condition

  def head_streams(self, stream: mot.Stream, condition: Array) -> dict[str, mot.Stream]:
    """Token rows as the head takes them, from their first: it modulates the picture before."""
    first, last = self.reference
    cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[:, start:stop], stream)
    reference = dataclasses.replace(cut(first, last), condition=condition)
    return {'before': cut(0, first), 'reference': reference, 'ar': cut(last, stream.x.shape[1])}

  def __call__(
    self,
    params: Params,
    regions: Mapping[str, Region],
    reference: Array,
    latents: Array,
    clock: Array,
  ) -> tuple[Array, Array]:
    """The whole sequence at once, as in training; see Unified.__call__.

    `reference` are the clean latents of the picture before, `latents` the noisy ones of the other:
    both [B, h, w, C].
    """
    picture, condition = self.model.picture_stream(params, latents, clock, regions['dit'])
    tokens, clean = self.token_stream(params, regions['ar'], reference)
    hidden, _ = self.model.backbone(params, {'ar': tokens, 'dit': picture})
    streams = self.head_streams(dataclasses.replace(tokens, x=hidden['ar']), clean)
    streams['dit'] = dataclasses.replace(picture, x=hidden['dit'], condition=condition)
    rows, _ = self.model.head(params, streams)
    return hidden['ar'], self.model.velocity(params, rows['dit'], condition)

  def clean(self, params: Params, count: int) -> tuple[Array, Array]:
    """The head's condition and the time token of finished pictures."""
    return self.model.time(params, jnp.ones((count,)))
