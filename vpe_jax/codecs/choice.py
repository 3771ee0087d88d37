"""Which codecs a system reads pictures with: those trained here, or published ones.

A visual prompt comes from the embedded SigLIP and its quantiser, from a published tower and the
quantiser that was trained on it (`visual_prompt.encoder`), or from SigLIP-VQ where `siglip_vq` is
given. Latents come from the embedded autoencoder, or from a published one where
`vae` is given; a picture's own codes come from that autoencoder's quantised latents, or from a
published tokenizer where `vqgan` is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vpe_jax.codecs import image_codes, kl, kl_vae, siglip_vq, towers, visual_prompt, vqgan
from vpe_jax.codecs.protocol import LatentCodec, PictureCodec, PlanCodec
from vpe_jax.contracts import Array, Params, PretrainedWeights


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
  """Where each frozen network's weights are: `assets:NAME`, a path, or a hub id.

  Those of `encoder`, of `siglip_vq`, of `vqgan`, and of `image` where `vae` is given, are
  published: a folder, an import, or a hub id (`OWNER/NAME:FOLDER`). `encoder` is the tower that
  `visual_prompt.encoder` names in the place of `siglip`; empty: its release (towers.RELEASES).
  """

  siglip: str = 'assets:siglip'
  encoder: str = ''
  visual_prompt: str = 'assets:visual_prompt'
  image: str = 'assets:image'
  image_codes: str = 'assets:image_codes'
  siglip_vq: str = ''
  vqgan: str = ''


@dataclasses.dataclass(frozen=True)
class SiglipVqView(siglip_vq.SiglipVqConfig):
  """SigLIP-VQ, and the side in pixels of the view of the picture that it sees."""

  image_size: int = 384


@dataclasses.dataclass(frozen=True)
class VaeConfig(kl_vae.KlVaeConfig):
  """A published autoencoder, and its family: `wan_vae` or `kl_vae`."""

  family: str = 'wan_vae'


@dataclasses.dataclass(frozen=True)
class VqGanView(vqgan.VqGanConfig):
  """A published tokenizer: its family (`ibq`, `llamagen_vq`), and the pictures' side in pixels."""

  family: str = 'ibq'
  image_size: int = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCodecConfig:
  """The visual prompt's part of a model section.

  Attributes:
    vpe: whether the model has a visual prompt at all; without, it has no codes and no tokens, and
      nothing reads the sizes below.
    visual_prompt: sizes of the embedded tokenizer that turns pictures into codes.
    siglip_vq: sizes of the published tokenizer that takes the place of `visual_prompt`.
    weights: where the frozen networks come from.
  """

  vpe: bool = True
  visual_prompt: visual_prompt.VisualPromptConfig = visual_prompt.VisualPromptConfig()
  siglip_vq: SiglipVqView | None = None
  weights: WeightsConfig = WeightsConfig()

  @property
  def plan_codes(self) -> int:
    """Rows of the visual prompt's codebook."""
    return (self.siglip_vq or self.visual_prompt).codes if self.vpe else 0

  @property
  def plan_tokens(self) -> int:
    """Codes of a visual prompt."""
    if not self.vpe:
      return 0
    if self.siglip_vq is not None:
      return (self.siglip_vq.image_size // self.siglip_vq.patch) ** 2
    return self.visual_prompt.patches

  @property
  def plan_weights(self) -> Mapping[str, str]:
    """Name of each network that makes visual prompts -> where its weights are."""
    if not self.vpe:
      return {}
    if self.siglip_vq is not None:
      return {'siglip_vq': self.weights.siglip_vq}
    given = self.weights
    tower = tower_weights(self.visual_prompt, given.siglip, given.encoder)
    return {**tower, 'visual_prompt': given.visual_prompt}

  @property
  def published(self) -> Mapping[str, PretrainedWeights]:
    """The published ones among the frozen networks."""
    if not self.vpe:
      return {}
    if self.siglip_vq is None:
      return published_tower(self.visual_prompt, self.weights.encoder)
    sizes = _base(self.siglip_vq, siglip_vq.SiglipVqConfig)
    return {'siglip_vq': PretrainedWeights('siglip_vq', self.weights.siglip_vq, sizes)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecsConfig(PlanCodecConfig):
  """The codecs' part of the model section of a system that draws latents.

  Attributes:
    image: sizes of the embedded autoencoder that turns pictures into latents and back.
    vae: sizes of the published autoencoder that takes the place of `image`.
  """

  image: kl.KlConfig = kl.KlConfig()
  vae: VaeConfig | None = None

  @property
  def image_channels(self) -> int:
    """Numbers per latent."""
    return (self.vae or self.image).channels

  @property
  def frozen_weights(self) -> Mapping[str, str]:
    """Name of each network that the codecs read -> where its weights are."""
    return {**self.plan_weights, 'image': self.weights.image}

  @property
  def published(self) -> Mapping[str, PretrainedWeights]:
    """The published ones among them."""
    found = dict(super().published)
    if self.vae is not None:
      sizes = _base(self.vae, kl_vae.KlVaeConfig)
      found['image'] = PretrainedWeights(self.vae.family, self.weights.image, sizes)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureCodesConfig(PlanCodecConfig):
  """The codecs' part of the model section of a system that draws a picture code by code.

  Attributes:
    image: sizes of the embedded autoencoder whose latents are quantised.
    image_codes: sizes of the quantiser.
    vqgan: sizes of the published tokenizer that takes the place of both.
  """

  image: kl.KlConfig = kl.KlConfig()
  image_codes: image_codes.ImageCodesConfig = image_codes.ImageCodesConfig()
  vqgan: VqGanView | None = None

  @property
  def picture_weights(self) -> Mapping[str, str]:
    """Name of each network that turns pictures into codes and back -> where its weights are."""
    names = ('image', 'image_codes') if self.vqgan is None else ('vqgan',)
    return {name: getattr(self.weights, name) for name in names}

  @property
  def published(self) -> Mapping[str, PretrainedWeights]:
    """The published ones among the frozen networks."""
    found = dict(super().published)
    if self.vqgan is not None:
      sizes = _base(self.vqgan, vqgan.VqGanConfig)
      found['vqgan'] = PretrainedWeights(self.vqgan.family, self.weights.vqgan, sizes)
    return found


class NoVisualPrompt:
  """The protocol.TokenCodec of a model without visual prompt: pictures have no codes."""

  weights = ()
  codes = grid = 0

  def encode(self, params: Params, images: Array) -> Array:
    """No codes [B, 0] int32."""
    del params
    return jnp.zeros((images.shape[0], 0), jnp.int32)

  def abstract_params(self) -> Params:
    """No networks."""
    return {}


def plan_codec(config: PlanCodecConfig, dtype: jnp.dtype) -> PlanCodec | NoVisualPrompt:
  """The visual prompt's codec; `dtype` is what a published tower computes in."""
  if not config.vpe:
    return NoVisualPrompt()
  if config.siglip_vq is None:
    return visual_prompt.VisualPromptCodec(config.visual_prompt)
  return siglip_vq.SiglipVqCodec(config.siglip_vq, config.siglip_vq.image_size, dtype=dtype)


def image_codec(config: CodecsConfig) -> LatentCodec:
  """The latents' codec, in float32."""
  return kl.KlCodec(config.image) if config.vae is None else kl_vae.KlVaeCodec(config.vae)


def picture_codec(config: PictureCodesConfig, image_size: int) -> PictureCodec:
  """The codec of a picture's own codes, in float32; `image_size` is the picture's, in pixels."""
  if config.vqgan is None:
    return image_codes.ImageCodesCodec(config.image_codes, config.image, image_size)
  return vqgan.VqGanCodec(config.vqgan, config.vqgan.image_size, 'vqgan')


def tower_weights(config: towers.TowerConfig, siglip: str, encoder: str) -> Mapping[str, str]:
  """Name of the tower of a visual prompt -> where its weights are.

  Args:
    config: which tower.
    siglip: where the embedded SigLIP is.
    encoder: where a published tower is; '' for its release.
  """
  if config.encoder == 'siglip':
    return {'siglip': siglip}
  return {config.encoder: encoder or towers.RELEASES[config.encoder]}


def published_tower(config: towers.TowerConfig, encoder: str) -> Mapping[str, PretrainedWeights]:
  """The tower of a visual prompt, where it is published; arguments as `tower_weights`."""
  if config.published is None:
    return {}
  family, sizes = config.published
  source = encoder or towers.RELEASES[config.encoder]
  return {config.encoder: PretrainedWeights(family, source, sizes)}


def _base(section: Any, cls: type) -> Any:
  """The part of a section that its base class holds."""
  return cls(**{field.name: getattr(section, field.name) for field in dataclasses.fields(cls)})
