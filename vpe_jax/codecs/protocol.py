"""What every codec offers.

A codec holds sizes only; its weights are an argument. `params` maps network names to their
trees, so a system hands over its whole `frozen` mapping and each codec takes what it names in
`weights`. All calls are pure and jittable, and work on sharded batches.
"""

from __future__ import annotations

from typing import Protocol

from vpe_jax.contracts import Array, Params


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
