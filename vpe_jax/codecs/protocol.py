"""Interfaces of codecs.

A codec holds sizes only; weights are an argument. `params` maps network names to parameters, so a
system passes its whole `frozen` mapping, and each codec reads the networks in its `network_names`.
All methods are pure and jittable, and work on sharded batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax.numpy as jnp

from vpe_jax.contracts import Array, FrozenNetwork, Params


class TokenCodec(Protocol):
  """Images -> a grid of discrete codes.

  Attributes:
    network_names: names of the networks in `params` that the codec reads.
    codes: size V of the codebook.
    grid: codes along each side; P = grid * grid, in raster order.
  """

  network_names: tuple[str, ...]
  codes: int
  grid: int

  def encode(self, params: Params, images: Array) -> Array:
    """Codes [B, P] int32 of images [B, R, R, 3], uint8 or float in [0, 1]."""
    ...

  def abstract_params(self) -> Params:
    """Parameters of the networks in `network_names`, as `jax.ShapeDtypeStruct`, by network."""
    ...


class FeatureCodec(TokenCodec, Protocol):
  """Images -> discrete codes of image features: the content of an image, not its pixels.

  Attributes:
    codebook: path of the codebook [V, W] in `params`, beginning with the network's name; W is the
      width of an entry.
    view_side: side in pixels of the images that `encode` reads, which the pipeline resizes from
      the original image; 0 if `encode` reads the system's images, of side `data.image_size`.
  """

  codebook: str
  view_side: int


class ImageCodec(TokenCodec, Protocol):
  """Images <-> a grid of discrete codes, from which they are reconstructed.

  Attributes:
    sampled: false: codes are not sampled.
  """

  sampled: bool

  def decode(self, params: Params, codes: Array, rng: Array | None = None) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of codes [B, P]; see LatentCodec.decode."""
    ...


class LatentCodec(Protocol):
  """Images <-> a small grid of continuous latents with mean 0 and variance 1.

  Attributes:
    network_names: names of the networks in `params` that the codec reads.
    factor: pixels per latent along each side.
    channels: channels C of the latents.
    sampled: whether latents for training are sampled; otherwise `encode` gets no keys.
  """

  network_names: tuple[str, ...]
  factor: int
  channels: int
  sampled: bool

  def encode(self, params: Params, images: Array, keys: Array | None = None) -> Array:
    """Latents [B, h, w, C] float32 of images [B, R, R, 3], uint8 or float in [0, 1].

    h = w = R / factor. `keys` [B] are the random keys of sampled latents.
    """
    ...

  def decode(self, params: Params, latents: Array, rng: Array | None = None) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of latents [B, h, w, C].

    `rng` keys the noise of a stochastic decoder; a deterministic one ignores it.
    """
    ...

  def abstract_params(self) -> Params:
    """Parameters of the networks in `network_names`, as `jax.ShapeDtypeStruct`, by network."""
    ...


class Section(Protocol):
  """The config section of a codec: a frozen dataclass of sizes and sources of weights.

  Attributes:
    kind: key of the section in vpe_jax.codecs.registry.
    frozen: the networks that the codec reads, by name.
  """

  kind: str
  frozen: Mapping[str, FrozenNetwork]


class FeatureCodeSection(Section, Protocol):
  """The section of a FeatureCodec.

  Attributes:
    codes: size V of the codebook.
    tokens: codes P per image.
  """

  codes: int
  tokens: int

  def codec(self, dtype: jnp.dtype) -> FeatureCodec:
    """The codec; `dtype` is the requested compute dtype, which a codec may replace by float32."""
    ...


class LatentSection(Section, Protocol):
  """The section of a LatentCodec.

  Attributes:
    channels: channels C of the latents.
  """

  channels: int

  def codec(self) -> LatentCodec:
    """The codec, in float32."""
    ...


class ImageCodeSection(Section, Protocol):
  """The section of an ImageCodec."""

  def codec(self, image_size: int) -> ImageCodec:
    """The codec, in float32, for images with a side of `image_size` pixels.

    A codec that resizes images to a size of its own ignores `image_size`.
    """
    ...
