"""What systems that draw from a class share: one stage, a class as text, codecs, batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.codecs import choice
from vpe_jax.config import Config, nearest
from vpe_jax.contracts import Array, Examples, Params, Stage, Start, UserError, Weight
from vpe_jax.models import mot
from vpe_jax.ops.flops import matrix_flops


class ClassToImage:
  """The base of such a system, which gives it `model`, `image` and `abstract_encoded`.

  See vpe_jax.contracts.System for what the methods are.
  """

  plan_similarity = None  # A class is a number, not a text.
  model: Any
  image: Any

  def __init__(self, config: Config, losses: Mapping[str, float | Weight]) -> None:
    """Takes what is common from a config; `losses` are those of the stage.

    Raises:
      UserError: the config names another stage, or captions of more than a token.
    """
    for name in config.stages:
      if name != 'train':
        raise UserError(f"no stage '{name}' in this system{nearest(name, ('train',))}")
    if config.data.text_length != 1:
      raise UserError(
        f'data.text_length is {config.data.text_length}, but a class is one token: set it to 1'
      )
    self.config = config
    self.stages = (Stage('train', ('.*',), dict(sorted(losses.items())), ema=True),)
    self.visual_prompt = choice.plan_codec(config.model, jnp.dtype(config.dtype))
    self.codes = config.model.plan_codes

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

  def prepare(self, params: Params) -> Params:
    """Parameters in the layout that decoding is fast in; outside jit, once."""
    return {**params, 'layers': mot.unstack(params['layers'])}

  def abstract_batch(self, batch_size: int) -> Examples:
    """Images where encoders run online, else codes and latents."""
    ints = lambda *shape: jax.ShapeDtypeStruct((batch_size, *shape), jnp.int32)
    common = {'example': ints(), 'text': ints(1), 'text_length': ints()}
    R = self.config.data.image_size
    if self.config.data.encode == 'online':
      image = jax.ShapeDtypeStruct((batch_size, R, R, 3), jnp.uint8)
      return Examples(**common, image=image)
    codes, latents = self.abstract_encoded(batch_size)
    return Examples(**common, codes=codes, latents=latents)

  def abstract_frozen(self) -> Params:
    """The codecs' networks as shapes; none where codes and latents are synthetic."""
    if not self.frozen_weights:
      return {}
    return {**self.visual_prompt.abstract_params(), **self.image.abstract_params()}

  def encoder_flops(self) -> float:
    """Matrix FLOPs of the frozen encoders for one example, where they run online."""
    data = self.config.data
    if data.encode != 'online' or not self.frozen_weights:
      return 0.0
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), jnp.uint8)
    return matrix_flops(self.encode, self.abstract_frozen(), image)
