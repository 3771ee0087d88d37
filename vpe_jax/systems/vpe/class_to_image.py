"""Base of class-to-image systems: one stage, and a class in the place of the caption."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from vpe_jax.config import Config, nearest
from vpe_jax.contracts import PlansVisually, Samples, Stage, UserError, Weight
from vpe_jax.systems.vpe.image_system import DrawingSystem


class ClassToImage(DrawingSystem):
  """The base of such a system, which gives it `model` and `image`."""

  plan_rankers = ('likelihood',)  # A class is a number, which no text tower compares.

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
    self.visual_prompt = config.model.prompt_codec(jnp.dtype(config.dtype))
    self.codes = config.model.plan_codes
    self.drafts = ('visual_prompt',) if self.codes else ()
    self.capabilities = (Samples, PlansVisually) if self.codes else (Samples,)
    self.table = ('model.classes', config.model.classes)
