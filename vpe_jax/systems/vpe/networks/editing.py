"""The source image of an edit, among the tokens of a unified model (arXiv 2606.04457, App. C, D).

A second dual path, `ar/dual_path`, embeds the clean latents of the source image for the AR expert,
whose sequence is `[bos] [boi] time x_src [eoi] ...` (vpe_jax.systems.vpe.layouts.edit). Clean
latents have Show-o2's time 1 (`clock`). At this time the time embedding, which is that of the
generated image, gives the time token of the source image, and the condition by which the head
modulates its tokens. Show-o2 does the same with images that it understands.
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
class SourceImageNetwork:
  """The network of one configuration, whose AR expert reads a source image.

  Attributes:
    model: the network; its config has `references`.
    reference: first slot of the source image in the AR expert's region (its time token), and the
      slot after its last.
  """

  model: Unified
  reference: tuple[int, int]

  def token_stream(
    self, params: Params, region: Region, latents: Array
  ) -> tuple[mot.Stream, Array]:
    """The AR expert's input, and the condition [B, 1, head width] of the source image in the head.

    Args:
      params: parameters of the model.
      region: the AR expert's region, or its first slots, including the source image.
      latents: clean latents of the source image [B, h, w, C].
    """
    stream = self.model.token_stream(params, region)
    condition, token = self.clean(params, latents.shape[0])
    source = self.model.embed_image(params['ar'], token, latents)
    first, last = self.reference
    x = jnp.concatenate([stream.x[:, :first], source, stream.x[:, last:]], 1)
    return dataclasses.replace(stream, x=x), condition

  def head_streams(self, stream: mot.Stream, condition: Array) -> dict[str, mot.Stream]:
    """The head's input for the AR expert's tokens; only the source image is modulated."""
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

    `reference` are the clean latents of the source image, `latents` the noisy ones of the edited
    image: both [B, h, w, C].
    """
    image, condition = self.model.image_stream(params, latents, clock, regions['dit'])
    tokens, clean = self.token_stream(params, regions['ar'], reference)
    hidden, _ = self.model.backbone(params, {'ar': tokens, 'dit': image})
    streams = self.head_streams(dataclasses.replace(tokens, x=hidden['ar']), clean)
    streams['dit'] = dataclasses.replace(image, x=hidden['dit'], condition=condition)
    out, _ = self.model.head(params, streams)
    return hidden['ar'], self.model.velocity(params, out['dit'], condition)

  def clean(self, params: Params, count: int) -> tuple[Array, Array]:
    """The head's condition and the time token of `count` clean images: [count, 1, width] each."""
    return self.model.time(params, jnp.ones((count,)))
