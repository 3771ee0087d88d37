"""The SigLIP system: two towers trained on pictures and captions by the sigmoid loss.

One stage, `align`. The same system, with another seed and patch size, makes the judge that
scores generated pictures and that no generator ever sees in training.
"""

from __future__ import annotations

import dataclasses
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
    """One a picture."""
    pictures = jnp.float32(batch.example.shape[0])
    return {'sigmoid': pictures, 'retrieval': pictures}

  def losses(
    self, params: Params, frozen: Params, batch: Examples, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """The sigmoid loss over all pairs of the batch, and in-batch retrieval (logged only).

    With gradient accumulation the pairs are those within a microbatch.
    """
    model = self.config.model
    views = pixels.jittered_view(
      batch.image, model.siglip.image_size, model.jitter, rng, batch.example
    )
    variables = {'params': params}
    logits = self.network.apply(
      variables, pixels.to_signed(views), batch.text, batch.text_length
    )
    positive = alignment.same_caption(batch.text)
    hits = alignment.retrieval_hits(logits, positive)
    count = jnp.float32(batch.example.shape[0])
    return {
      'sigmoid': LossTerm(jnp.sum(alignment.sigmoid_loss(logits, positive)), count, 1.0),
      'retrieval': LossTerm(jnp.sum(hits), count, 0.0),
    }

  def flops(self, stage: Stage) -> float:
    """Three forward passes' worth: the backward pass costs two."""
    return 3.0 * siglip.flops(self.config.model.siglip)

  def tokens(self, stage: Stage) -> int:
    """Patches and caption tokens."""
    c = self.config.model.siglip
    return c.patches + c.text_length


def abstract_pictures(config: Config, batch_size: int) -> Examples:
  """The batch of systems that read pictures and captions: shapes and dtypes."""
  B, R, T = batch_size, config.data.image_size, config.data.text_length
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  image = jax.ShapeDtypeStruct((B, R, R, 3), jnp.uint8)
  return Examples(example=ints(B), text=ints(B, T), text_length=ints(B), image=image)
