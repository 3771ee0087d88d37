"""What systems that draw share: frozen codecs, batches of pictures with a text, parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.codecs.choice import NoVisualPrompt
from vpe_jax.codecs.protocol import LatentCodec, PictureCodec, PlanCodec
from vpe_jax.config import Config
from vpe_jax.contracts import Array, Examples, Params, Start
from vpe_jax.models import dense
from vpe_jax.ops.flops import matrix_flops


class DrawingSystem:
  """The base of such a system; see vpe_jax.contracts.System for what the methods are.

  `abstract_encoded`, `encode` and `decode` are those of systems that draw latents; one whose
  pictures are codes has its own.

  Attributes:
    config: the whole run's.
    model: the network.
    visual_prompt: the codec of plans.
    image: the codec of pictures.
  """

  config: Config
  model: Any
  visual_prompt: PlanCodec | NoVisualPrompt
  image: LatentCodec | PictureCodec

  @property
  def frozen_weights(self) -> Mapping[str, str]:
    """No codec is needed where codes and latents are synthetic."""
    if self.config.data.source == 'synthetic':
      return {}
    return self.config.model.frozen_weights

  @property
  def published(self) -> Mapping[str, Start]:
    """Those of the frozen networks that are published."""
    return self.config.model.published

  def init(self, rng: Array) -> Params:
    """Fresh parameters, float32."""
    return self.model.init(rng)

  def prepare(self, params: Params, platform: str = '') -> Params:
    """Parameters in the layout that decoding on a platform is fast in; outside jit, once."""
    apart = self.model.prepare(params)
    return dense.turned(apart) if platform == 'cpu' else apart

  def abstract_batch(self, batch_size: int) -> Examples:
    """Images where encoders run online, else codes and latents."""
    data = self.config.data
    leaf = lambda shape, dtype: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    common = {
      'example': leaf((), jnp.int32),
      'text': leaf((data.text_length,), jnp.int32),
      'text_length': leaf((), jnp.int32),
    }
    if data.encode == 'online':
      return Examples(**common, image=leaf((data.image_size, data.image_size, 3), jnp.uint8))
    codes, latents = self.abstract_encoded(batch_size)
    return Examples(**common, codes=codes, latents=latents)

  def abstract_encoded(self, batch_size: int) -> tuple[Any, Any]:
    """The codes [B, P] and latents [B, h, w, C] that the model takes: what `encode` must make."""
    c = self.config.model
    grid = (c.latent_size, c.latent_size, c.latent_channels)
    codes = jax.ShapeDtypeStruct((batch_size, c.plan_tokens), jnp.int32)
    return codes, jax.ShapeDtypeStruct((batch_size, *grid), jnp.float32)

  def abstract_frozen(self) -> Params:
    """Both codecs' networks as shapes; none where codes and latents are synthetic."""
    if not self.frozen_weights:
      return {}
    return {**self.visual_prompt.abstract_params(), **self.image.abstract_params()}

  def encode(self, frozen: Params, images: Array) -> tuple[Array, Array]:
    """Codes [B, P] int32 (P = 0 without visual prompt) and latents of images [B, R, R, 3] uint8."""
    return self.visual_prompt.encode(frozen, images), self.image.encode(frozen, images)

  def decode(self, frozen: Params, latents: Array) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of latents [B, h, w, C]."""
    return self.image.decode(frozen, latents)

  def _online_flops(self, encode: Callable[[Params, Array], Any]) -> float:
    """Matrix FLOPs of `encode(frozen, images)` for one picture; 0 where no encoder runs online."""
    data = self.config.data
    if data.encode != 'online' or not self.frozen_weights:
      return 0.0
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), jnp.uint8)
    return matrix_flops(encode, self.abstract_frozen(), image)
