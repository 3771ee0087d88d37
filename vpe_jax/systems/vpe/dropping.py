"""Conditions that training drops, for the null branches of guidance (arXiv 2606.04457, App. D)."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.contracts import Array, Batch, Stage
from vpe_jax.systems.vpe import layouts


class Dropping(Protocol):
  """Random decisions per example, each a function of the example's own key."""

  def keep(self, batch: Batch, rng: Array, stage: Stage) -> dict[str, Array]:
    """For each condition of systems/vpe/layouts.py, which examples keep it: bool [B]."""
    ...

  def captions(self, batch: Batch, rng: Array) -> Batch:
    """The batch with some captions emptied."""
    ...


@dataclasses.dataclass(frozen=True)
class OneCondition:
  """Text to image: one condition is dropped, and some captions are emptied besides.

  Attributes:
    condition: PROMPT (text and visual prompt together) or VISUAL_PROMPT.
    rate: share of examples without the condition, in stages with a flow loss; other stages train
      no null branch of the image and always keep it.
    text_rate: share of examples whose caption is emptied.
  """

  condition: str
  rate: float
  text_rate: float

  def keep(self, batch: Batch, rng: Array, stage: Stage) -> dict[str, Array]:
    """See Dropping."""
    keep = _all(batch)
    if 'flow' in stage.losses:
      draw = lambda key: jax.random.uniform(key) >= self.rate
      keep[self.condition] = rng_lib.per_example(draw, rng, 'drop', batch.example)
    return keep

  def captions(self, batch: Batch, rng: Array) -> Batch:
    """See Dropping."""
    if not self.text_rate:
      return batch
    draw = lambda key: jax.random.uniform(key) >= self.text_rate
    keep = rng_lib.per_example(draw, rng, 'drop_text', batch.example)
    length = jnp.where(keep, batch.inputs['text_length'], 0)
    return dataclasses.replace(batch, inputs={**batch.inputs, 'text_length': length})


@dataclasses.dataclass(frozen=True)
class PromptOrSource:
  """Editing: one random draw per example drops the prompt, the source image, both or neither.

  Attributes:
    prompt_rate: share of examples that lack only the prompt.
    source_rate: share of examples that lack only the source image.
    both_rate: share of examples that lack both.
  """

  prompt_rate: float
  source_rate: float
  both_rate: float

  def keep(self, batch: Batch, rng: Array, stage: Stage) -> dict[str, Array]:
    """See Dropping."""
    del stage
    value = rng_lib.per_example(jax.random.uniform, rng, 'drop', batch.example)
    prompt, either = self.prompt_rate, self.prompt_rate + self.source_rate
    both = (either <= value) & (value < either + self.both_rate)
    return _all(batch) | {
      layouts.PROMPT: (value >= prompt) & ~both,
      layouts.SOURCE: ((value < prompt) | (value >= either)) & ~both,
    }

  def captions(self, batch: Batch, rng: Array) -> Batch:
    """See Dropping."""
    del rng
    return batch


def _all(batch: Batch) -> dict[str, Array]:
  names = (*layouts.CONDITIONS, layouts.VISUAL_PROMPT)
  return dict.fromkeys(names, jnp.ones(batch.example.shape, bool))
