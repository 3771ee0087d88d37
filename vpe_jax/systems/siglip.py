"""The SigLIP system: two towers trained on pictures and captions by the sigmoid loss.

One stage, `align`. The same system, with another seed and patch size, makes the judge that
scores generated pictures and that no generator ever sees in training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax.codecs import pixels
from vpe_jax.config import Config
from vpe_jax.contracts import Array, Examples, LossTerm, Params, Stage, UserError
from vpe_jax.models import siglip
from vpe_jax.objectives import alignment

# Layers of models/vit.py; systems/codec.py has the same ones in its decoder.
ENCODER_AXES = (
  (r'(q|k|v)/kernel', ('embed', 'heads', 'head')),
  (r'(q|k|v)/bias', ('heads', 'head')),
  (r'o/kernel', ('heads', 'head', 'embed')),
  (r'up/kernel', ('embed', 'mlp')),
  (r'up/bias', ('mlp',)),
  (r'down/kernel', ('mlp', 'embed')),
  (r'position', ('position', 'embed')),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The `model` section: sizes of the towers, and how training views are jittered."""

  siglip: siglip.SiglipConfig = siglip.SiglipConfig()
  jitter: pixels.Jitter = pixels.Jitter()


class System:
  """Trains `params` = the towers of models/siglip.py; see vpe_jax.contracts.System."""

  logical_axes = (
    *ENCODER_AXES,
    (r'text/token', ('vocab', 'embed')),
    (r'vision/embed/kernel', ('features', 'embed')),
    (r'vision/pooling/probe', (None, 'embed')),
    (r'text/head/kernel', ('embed', 'features')),
    (r'(bias|scale)', ('embed',)),
  )
  frozen_weights: Mapping[str, str] = {}

  def __init__(self, config: Config):
    """Checks the sizes against the data.

    Raises:
      UserError: captions of the data are longer than the text tower reads, or an unknown stage.
    """
    self.config = config
    c = config.model.siglip
    if config.data.text_length > c.text_length:
      raise UserError(
        f'data.text_length {config.data.text_length} exceeds model.siglip.text_length '
        f'{c.text_length}: set both to the same'
      )
    self.stages = tuple(self._stage(name) for name in config.stages)
    self.network = siglip.Siglip(c, jnp.dtype(config.dtype))

  def _stage(self, name: str) -> Stage:
    if name != 'align':
      raise UserError(f"the siglip system has no stage '{name}': its only stage is 'align'")
    losses = ('sigmoid', 'retrieval')
    if self.config.data.near_misses:
      losses += ('near', 'near_retrieval')
    return Stage(name, trainable=('.*',), losses=losses, ema=True, source='random initialisation')

  def init(self, rng: Array) -> Params:
    """Fresh towers."""
    c = self.config.model.siglip
    images = jnp.zeros((1, c.image_size, c.image_size, 3))
    text, length = jnp.zeros((1, c.text_length), jnp.int32), jnp.ones((1,), jnp.int32)
    return self.network.init(rng, images, text, length)['params']

  def abstract_batch(self, batch_size: int) -> Examples:
    """Pictures and captions."""
    return abstract_pictures(self.config, batch_size)

  def counts(self, batch: Examples, rng: Array, stage: Stage) -> dict[str, Array]:
    """One a picture; `near_retrieval` counts the pictures that have near misses."""
    pictures = jnp.float32(batch.example.shape[0])
    counts = dict.fromkeys(stage.losses, pictures)
    if 'near' in stage.losses:
      counts['near_retrieval'] = jnp.sum(jnp.any(batch.near_length > 0, -1), dtype=jnp.float32)
    return counts

  def losses(
    self, params: Params, frozen: Params, batch: Examples, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """The sigmoid loss over all pairs of the batch, and in-batch retrieval (logged only).

    With gradient accumulation the pairs are those within a microbatch. Near misses
    (`data.near_misses`) are further negatives of their own picture alone: `near` is their part of
    the loss, `near_retrieval` the share of pictures whose own caption beats all of them (logged).
    """
    model, variables = self.config.model, {'params': params}
    views = pixels.jittered_view(
      batch.image, model.siglip.image_size, model.jitter, rng, batch.example
    )
    apply = functools.partial(self.network.apply, variables)
    images = apply(pixels.to_signed(views), method='embed_images')
    text = apply(batch.text, batch.text_length, method='embed_text')
    logits = apply(images, text, method='logits')
    positive = alignment.same_caption(batch.text)
    values = {
      'sigmoid': (alignment.sigmoid_loss(logits, positive), 1.0),
      'retrieval': (alignment.retrieval_hits(logits, positive), 0.0),
    }
    if 'near' in stage.losses:
      B, M, T = batch.near.shape
      length = batch.near_length
      near = apply(batch.near.reshape(B * M, T), length.reshape(B * M), method='embed_text')
      wrong = apply(images, near.reshape(B, M, -1), method='own_logits')
      values['near'] = (alignment.near_loss(wrong, length > 0), 1.0)
      values['near_retrieval'] = (alignment.near_hits(jnp.diagonal(logits), wrong, length > 0), 0.0)
    counts = self.counts(batch, rng, stage)
    return {n: LossTerm(jnp.sum(value), counts[n], w) for n, (value, w) in values.items()}

  def flops(self, stage: Stage) -> float:
    """Three forward passes' worth: the backward pass costs two."""
    return 3.0 * siglip.flops(self.config.model.siglip, 1 + self.config.data.near_misses)

  def tokens(self, stage: Stage) -> int:
    """Patches and caption tokens."""
    c = self.config.model.siglip
    return c.patches + (1 + self.config.data.near_misses) * self.config.data.text_length


def abstract_pictures(config: Config, batch_size: int) -> Examples:
  """The batch of systems that read pictures and captions: shapes and dtypes."""
  B, R, T = batch_size, config.data.image_size, config.data.text_length
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  image = jax.ShapeDtypeStruct((B, R, R, 3), jnp.uint8)
  batch = Examples(example=ints(B), text=ints(B, T), text_length=ints(B), image=image)
  if M := config.data.near_misses:
    batch = dataclasses.replace(batch, near=ints(B, M, T), near_length=ints(B, M))
  return batch
