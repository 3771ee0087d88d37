"""Base class of all VPE systems: frozen codecs, and batches of prompts and images."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.codecs.protocol import FeatureCodec, ImageCodec, LatentCodec
from vpe_jax.config import Config, to_dict
from vpe_jax.contracts import (
  Array,
  Batch,
  BatchSpec,
  FrozenNetwork,
  Params,
  PlansVisually,
  Stage,
  UserError,
)
from vpe_jax.data.preprocess import PromptAndImage, prompt_and_image
from vpe_jax.models import kernel_layout
from vpe_jax.systems.vpe.codec_sections import NoVisualPrompt

VIEW = 'visual_prompt_image'  # the image at the side that the visual prompt's encoder reads


class ImageSystem(PlansVisually):
  """Contract methods that depend only on codecs and data; see vpe_jax.contracts.

  Attributes:
    config: configuration of the run.
    model: the network.
    visual_prompt: the codec of visual prompts.
    image: the codec of images.
    table: (config field, size) of the table that embeds prompt tokens.
    special_ids: config field -> id of a special token in the sequence.
  """

  config: Config
  model: Any
  visual_prompt: FeatureCodec | NoVisualPrompt
  image: LatentCodec | ImageCodec
  table: tuple[str, int]
  special_ids: Mapping[str, int] = MappingProxyType({})

  def __init__(
    self,
    config: Config,
    stages: tuple[Stage, ...],
    capabilities: tuple[type, ...],
    image: LatentCodec | ImageCodec,
    table: tuple[str, int],
  ) -> None:
    self.config, self.stages, self.capabilities = config, stages, capabilities
    self.image, self.table = image, table
    self.sampling_networks = image.network_names
    self.visual_prompt = config.model.prompt_codec(jnp.dtype(config.dtype))
    self.codes = config.model.visual_prompt_codes
    self.drafts = ('visual_prompt',) if self.codes else ()
    self.draft_image_side = self.visual_prompt.view_side

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """The codecs' networks; none where encoded entries are synthetic."""
    if self.config.data.source == 'synthetic':
      return {}
    return self.config.model.frozen

  @functools.cached_property
  def preprocess(self) -> PromptAndImage:
    """Prompt tokens and images."""
    return prompt_and_image(self.config.data, *self.table, self.special_ids, self.views)

  @property
  def views(self) -> dict[str, int]:
    """Images at other sizes than `data.image_size`: name -> side in pixels."""
    side = self.visual_prompt.view_side
    return {VIEW: side} if side not in (0, self.config.data.image_size) else {}

  @property
  def encoder_settings(self) -> dict[str, Any]:
    """The codecs' settings."""
    c = self.config.model
    settings = {'visual_prompt': to_dict(c.visual_prompt), 'image': to_dict(c.image)}
    for section in settings.values():  # Weights and dtype are identified by fingerprints.
      for name in [name for name in section if name.endswith(('weights', 'weights_dtype'))]:
        del section[name]
    return settings | self.views | {'vpe': c.vpe, 'dtype': self.config.dtype}

  def init(self, rng: Array) -> Params:
    """Random initial parameters, float32."""
    return self.model.init(rng)

  def prepare(self, params: Params, platform: str = '') -> Params:
    """Parameters in the layout in which sampling is fast on a platform; once, outside jit."""
    return kernel_layout.for_decoding(self.model.prepare(params), platform)

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """Prompts; images, which only the codecs read; visual prompts and latents."""
    data = self.config.data
    leaf = lambda dtype, *shape: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    sides = {'image': data.image_size, **self.views}
    encoded = self.encoded_shapes(batch_size)
    return BatchSpec(
      inputs={'text': leaf(jnp.int32, data.text_length), 'text_length': leaf(jnp.int32)},
      encoder_inputs={name: leaf(jnp.uint8, side, side, 3) for name, side in sides.items()},
      encoded=encoded,
      cacheable=frozenset(encoded) - ({'latents'} if self.image.sampled else set()),
      codebooks=self.codebooks,
    )

  @property
  def codebooks(self) -> dict[str, int]:
    """Codebook sizes of the encoded entries that are codes."""
    return {'visual_prompt': self.codes} if self.codes else {}

  def encoded_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Visual prompts [B, P], where the model has any, and latents [B, h, w, C]."""
    c = self.config.model
    grid = (c.latent_size, c.latent_size, c.latent_channels)
    return self.prompt_shapes(batch_size) | {
      'latents': jax.ShapeDtypeStruct((batch_size, *grid), jnp.float32)
    }

  def check_image_size(self) -> None:
    """Checks that the codec encodes the data's images as latents of the model's size.

    Raises:
      UserError: it doesn't.
    """
    side, size = self.config.data.image_size, self.config.model.latent_size
    expected = size * self.image.factor
    if side != expected and self.config.data.source != 'synthetic':  # which has no images
      raise UserError(
        f'config.data.image_size is {side}: it must be {expected}, {self.image.factor} pixels for '
        f'each of the {size} latents along a side, or change model.latent_size'
      )

  def prompt_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Visual prompts [B, P], where the model has any."""
    P = self.config.model.visual_prompt_tokens
    return {'visual_prompt': jax.ShapeDtypeStruct((batch_size, P), jnp.int32)} if P else {}

  def frozen_shapes(self) -> Params:
    """Both codecs' networks as shapes; none where encoded entries are synthetic."""
    if not self.frozen:
      return {}
    return {**self.visual_prompt.abstract_params(), **self.image.abstract_params()}

  def encode(self, frozen: Params, inputs: Mapping[str, Array], keys: Array) -> dict[str, Array]:
    """Visual prompts, where the model has any, and latents of images [B, R, R, 3] uint8."""
    drafts = self.encode_drafts(frozen, inputs[VIEW if self.views else 'image'])
    return drafts | {'latents': self.encode_image(frozen, inputs['image'], keys)}

  def encode_image(self, frozen: Params, images: Array, keys: Array) -> Array:
    """Latents of images [B, R, R, 3] uint8, sampled with `keys` [B] if the codec samples."""
    if self.image.sampled:
      return self.image.encode(frozen, images, keys)
    return self.image.encode(frozen, images)

  @property
  def draft_encoders(self) -> tuple[str, ...]:
    """The networks of the visual prompt's codec."""
    return tuple(self.visual_prompt.network_names) if self.codes else ()

  def encode_drafts(self, frozen: Params, images: Array) -> dict[str, Array]:
    """Visual prompts [B, P] of images [B, S, S, 3], where the model has any.

    S is `draft_image_side`, or `data.image_size` if that is 0.
    """
    return {'visual_prompt': self.visual_prompt.encode(frozen, images)} if self.codes else {}

  def encoded(self, frozen: Params, batch: Batch, rng: Array) -> Mapping[str, Array]:
    """The batch's encoded entries; missing ones are computed online."""
    if batch.encoded.keys() >= self.encoded_shapes(1).keys():
      return batch.encoded
    keys = rng_lib.encoding_keys(rng, batch.example)
    return {**self.encode(frozen, batch.inputs, keys), **batch.encoded}

  def decode(self, frozen: Params, encoded: Mapping[str, Array], rng: Array) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of latents [B, h, w, C]."""
    del rng
    return self.image.decode(frozen, encoded['latents'])

  def reconstruct(self, frozen: Params, images: Array, rng: Array) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of images [B, R, R, 3] uint8, by the codec alone."""
    return self.image.decode(frozen, self.image.encode(frozen, images), rng)
