"""Parts that class-to-image systems share: a class takes the place of the caption."""

from __future__ import annotations

from collections.abc import Mapping

from vpe_jax.config import Config, did_you_mean
from vpe_jax.contracts import PlansVisually, Samples, Stage, UserError, Weight


def train_stage(config: Config, losses: Mapping[str, float | Weight]) -> Stage:
  """The only stage of a class-to-image system: `train`, with these losses.

  Raises:
    UserError: the config names another stage, or captions have more than one token.
  """
  for name in config.stages:
    if name != 'train':
      raise UserError(f"no stage '{name}' in this system{did_you_mean(name, ('train',))}")
  if config.data.text_length != 1:
    raise UserError(
      f'data.text_length is {config.data.text_length}, but a class is one token: set it to 1'
    )
  return Stage('train', ('.*',), dict(sorted(losses.items())), ema=True)


def capabilities(config: Config) -> tuple[type, ...]:
  """Capabilities of a class-to-image system, with or without visual prompt."""
  return (Samples, PlansVisually) if config.model.vpe else (Samples,)
