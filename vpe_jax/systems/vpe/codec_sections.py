"""Codec fields of the `model` sections of systems that generate images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from vpe_jax.codecs import registry
from vpe_jax.codecs.feature_vq import FeatureVqSection
from vpe_jax.codecs.image_codes import ImageCodesSection
from vpe_jax.codecs.kl import KlSection
from vpe_jax.codecs.protocol import FeatureCodec
from vpe_jax.contracts import Array, FrozenNetwork, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCodecs:
  """The codec of a visual prompt.

  Attributes:
    vpe: whether the model has a visual prompt. Without one, the codec is not used.
    visual_prompt: config section of the codec; `kind` selects its type.
  """

  vpe: bool = True
  visual_prompt: registry.FeatureCodeKinds = FeatureVqSection()

  @property
  def visual_prompt_codes(self) -> int:
    """Entries of the visual prompt's codebook; 0 without visual prompt."""
    return self.visual_prompt.codes if self.vpe else 0

  @property
  def visual_prompt_tokens(self) -> int:
    """Codes P of a visual prompt; 0 without visual prompt."""
    return self.visual_prompt.tokens if self.vpe else 0

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """The codecs' networks, by name."""
    return self.visual_prompt.frozen if self.vpe else {}

  def prompt_codec(self, dtype: jnp.dtype) -> FeatureCodec | NoVisualPrompt:
    """The visual prompt's codec; `dtype` is the compute dtype of a published tower."""
    return self.visual_prompt.codec(dtype) if self.vpe else NoVisualPrompt()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentCodecs(PromptCodecs):
  """The codecs of a system that generates latents.

  Attributes:
    image: config section of the latents' codec; `kind` selects its type.
  """

  image: registry.LatentKinds = KlSection()

  @property
  def image_channels(self) -> int:
    """Channels C of the latents."""
    return self.image.channels

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """The codecs' networks, by name."""
    return {**super().frozen, **self.image.frozen}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCodeCodecs(PromptCodecs):
  """The codecs of a system that generates an image code by code.

  Attributes:
    image: config section of the codec of image codes; `kind` selects its type.
  """

  image: registry.ImageCodeKinds = ImageCodesSection()

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """The codecs' networks, by name."""
    return {**super().frozen, **self.image.frozen}


class NoVisualPrompt:
  """The protocol.TokenCodec of a model without visual prompt: images have no codes."""

  network_names = ()
  codes = grid = view_side = 0

  def encode(self, params: Params, images: Array) -> Array:
    """No codes [B, 0] int32."""
    del params
    return jnp.zeros((images.shape[0], 0), jnp.int32)

  def abstract_params(self) -> Params:
    """No networks."""
    return {}
