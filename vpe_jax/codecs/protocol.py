"""Interfaces of codecs.

A codec holds sizes only; its weights are an argument. `params` maps network names to their
trees, so a system hands over its whole `frozen` mapping and each codec takes what it names in
`weights`. All calls are pure and jittable, and work on sharded batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax.numpy as jnp

from vpe_jax.contracts import Array, FrozenNetwork, Params


class TokenCodec(Protocol):
  """Pictures -> a grid of discrete codes.

  Attributes:
    weights: names of the networks in `params` that the codec reads.
    codes: number of different codes.
    grid: codes per side; P = grid * grid, raster order.
  """

  weights: tuple[str, ...]
  codes: int
  grid: int

  def encode(self, params: Params, images: Array) -> Array:
    """Codes [B, P] int32 of pictures [B, R, R, 3], uint8 or float in [0, 1]; in float32."""
    ...

  def abstract_params(self) -> Params:
    """The networks in `weights` as shapes: what `params` must hold, as `jax.ShapeDtypeStruct`."""
    ...


class PlanCodec(TokenCodec, Protocol):
  """Pictures -> the codes of a visual prompt.

  Attributes:
    codebook: path of the array [V, W] that codes index in `params`, the network's name first.
  """

  codebook: str


class PictureCodec(TokenCodec, Protocol):
  """Pictures <-> a grid of discrete codes that say everything about them."""

  def decode(self, params: Params, codes: Array, rng: Array | None = None) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of codes [B, P]; see LatentCodec.decode."""
    ...


class LatentCodec(Protocol):
  """Pictures <-> a small grid of numbers with mean 0 and variance 1.

  Attributes:
    weights: names of the networks in `params` that the codec reads.
    factor: pixels per latent, per side.
    channels: numbers C per latent.
  """

  weights: tuple[str, ...]
  factor: int
  channels: int

  def encode(self, params: Params, images: Array) -> Array:
    """Latents [B, R / factor, R / factor, C] float32 of pictures [B, R, R, 3]."""
    ...

  def decode(self, params: Params, latents: Array, rng: Array | None = None) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of latents [B, h, w, C].

    `rng` keys the noise of a stochastic decoder; a deterministic one ignores it.
    """
    ...

  def abstract_params(self) -> Params:
    """The networks in `weights` as shapes: what `params` must hold, as `jax.ShapeDtypeStruct`."""
    ...


class Section(Protocol):
  """The config section of a codec: a frozen dataclass of sizes and sources of weights.

  Attributes:
    kind: its name in vpe_jax.codecs.registry.
    frozen: the networks that the codec reads, by name.
  """

  kind: str
  frozen: Mapping[str, FrozenNetwork]


class VisualPromptSection(Section, Protocol):
  """The section of a codec of visual prompts.

  Attributes:
    codes: number of different codes.
    tokens: codes P of a visual prompt.
  """

  codes: int
  tokens: int

  def codec(self, dtype: jnp.dtype) -> PlanCodec:
    """The codec; `dtype` is the compute dtype of a published network."""
    ...


class LatentSection(Section, Protocol):
  """The section of a codec of latents.

  Attributes:
    channels: numbers C per latent.
  """

  channels: int

  def codec(self) -> LatentCodec:
    """The codec, in float32."""
    ...


class ImageCodeSection(Section, Protocol):
  """The section of a codec of discrete images."""

  def codec(self, image_size: int) -> PictureCodec:
    """The codec, in float32, for images of so many pixels a side."""
    ...
