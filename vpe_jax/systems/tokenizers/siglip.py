"""The SigLIP system: two towers trained on pictures and captions by the sigmoid loss.

One stage, `align`. The same system, with another seed and patch size, makes the judge that
scores generated pictures and that no generator ever sees in training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax import rng as rng_lib
from vpe_jax.codecs import pixels
from vpe_jax.config import Config, SampleConfig, check
from vpe_jax.contracts import (
  Array,
  Batch,
  BatchSpec,
  Initialization,
  LossTerm,
  Params,
  PretrainedWeights,
  Stage,
  UserError,
)
from vpe_jax.contracts import System as SystemProtocol
from vpe_jax.data.embedded import shapes
from vpe_jax.data.preprocess import PromptAndImage, prompt_and_image
from vpe_jax.data.tokenizers import bpe
from vpe_jax.models import siglip
from vpe_jax.objectives import alignment

# Layers of models/vit.py; systems/tokenizers/codec.py has the same ones in its decoder.
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
  """The `model` section: sizes of the towers, and how training pairs are varied.

  Attributes:
    siglip: both towers.
    jitter: how far training views are moved and zoomed.
    hide: share of tokens hidden where a caption is ranked among its near misses, the same places
      in all of them, for every other picture. What is left of the caption is still true, so
      each word has to count by itself: combinations that training lacks are understood by parts.
    blind: share of pictures, among those whose caption names a colour, that are shown in exchanged
      colours and ranked with all words for colours hidden: a shape is a shape in any colour. Such
      a caption fits many pictures, so they take no part in the sigmoid loss.
    init_from: a SigLIP that training starts from: a folder as transformers saves it, an import, or
      a hub id (empty: random initialisation).
  """

  siglip: siglip.SiglipConfig = siglip.SiglipConfig()
  jitter: pixels.Jitter = pixels.Jitter()
  hide: float = 0.0
  blind: float = 0.0
  init_from: str = ''

  def __post_init__(self) -> None:
    for name in ('hide', 'blind'):
      check(self, 'model.', name, 0 <= getattr(self, name) <= 1, 'between 0 and 1')


Sampling = SampleConfig  # no sampler, no settings


class System(SystemProtocol):
  """Trains `params` = the towers of models/siglip.py; see vpe_jax.contracts.System."""

  logical_axes = (
    *ENCODER_AXES,
    (r'text/token', ('vocab', 'embed')),
    (r'vision/embed/kernel', ('features', 'embed')),
    (r'vision/pooling/probe', (None, 'embed')),
    (r'text/head/kernel', ('embed', 'features')),
    (r'(bias|scale)', ('embed',)),
  )

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
    words = ' '.join((*shapes.COLOURS, *shapes.TINTS))
    self._colours = np.unique(bpe.shipped().encode(words)).astype(np.int32)

  def _stage(self, name: str) -> Stage:
    if name != 'align':
      raise UserError(f"the siglip system has no stage '{name}': its only stage is 'align'")
    losses = {'sigmoid': 1.0, 'retrieval': 0.0}
    if self.config.data.near_misses:
      losses |= {'near': 1.0, 'near_retrieval': 0.0}
    return Stage(name, ('.*',), losses, ema=True)

  @property
  def initialization(self) -> Initialization:
    """Published towers, where `model.init_from` names some."""
    c = self.config.model
    if not c.init_from:
      return Initialization()
    return Initialization((PretrainedWeights('siglip', c.init_from, c.siglip, (('', ''),)),))

  @functools.cached_property
  def preprocess(self) -> PromptAndImage:
    """Caption tokens, images and near misses."""
    return prompt_and_image(self.config.data)

  def init(self, rng: Array) -> Params:
    """Fresh towers."""
    c = self.config.model.siglip
    images = jnp.zeros((1, c.image_size, c.image_size, 3))
    ids, length = jnp.zeros((1, c.text_length), jnp.int32), jnp.ones((1,), jnp.int32)
    return self.network.init(rng, images, ids, length)['params']

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """Images and captions."""
    return captioned_images(self.config, batch_size)

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """One a picture; the near misses' terms count the pictures that have any."""
    plain = ~self._blind(batch, rng)
    counts = dict.fromkeys(stage.losses, jnp.sum(plain, dtype=jnp.float32))
    if 'near' in stage.losses:
      having = jnp.sum(jnp.any(batch.inputs['near_length'] > 0, -1), dtype=jnp.float32)
      counts['near'] = counts['near_retrieval'] = having
    return counts

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """The sigmoid loss over all pairs of the batch, and in-batch retrieval (logged only).

    With gradient accumulation the pairs are those within a microbatch. Near misses
    (`data.near_misses`) compete for their own picture alone: `near` ranks its caption among them,
    `near_retrieval` is the share of pictures whose own caption beats all of them (logged).
    """
    model, variables = self.config.model, {'params': params}
    views = pixels.jittered_view(
      batch.inputs['image'], model.siglip.image_size, model.jitter, rng, batch.example
    )
    blind = self._blind(batch, rng)
    if model.blind:
      other = pixels.exchanged_channels(views, rng, batch.example)
      views = jnp.where(blind[:, None, None, None], other, views)
    apply = functools.partial(self.network.apply, variables)
    text, length = batch.inputs['text'], batch.inputs['text_length']
    images = apply(pixels.to_signed(views), method='embed_images')
    captions = apply(text, length, method='embed_text')
    logits = apply(images, captions, method='logits')
    positive, plain = alignment.same_caption(text), ~blind
    loss = alignment.sigmoid_loss(logits, positive, plain[:, None] & plain)
    hits = alignment.retrieval_hits(jnp.where(plain, logits, -jnp.inf), positive) * plain
    values = {'sigmoid': loss, 'retrieval': hits}
    if 'near' in stage.losses:
      own, wrong = self._ranked(apply, images, batch, rng)
      exists = batch.inputs['near_length'] > 0
      values['near'] = alignment.near_loss(own, wrong, exists)
      values['near_retrieval'] = alignment.near_hits(own, wrong, exists)
    counts, weight = self.counts(batch, rng, step, stage), lambda name: stage.weight(name, step)
    return {n: LossTerm(jnp.sum(value), counts[n], weight(n)) for n, value in values.items()}

  def _blind(self, batch: Batch, rng: Array) -> Array:
    """Which pictures [B] are shown in exchanged colours."""
    share = self.config.model.blind
    draw = lambda key: jax.random.bernoulli(key, share)
    drawn = rng_lib.per_example(draw, rng, 'blind', batch.example)
    return drawn & jnp.any(jnp.isin(batch.inputs['text'], self._colours), -1)

  def _ranked(
    self, apply: Callable[..., Array], images: Array, batch: Batch, rng: Array
  ) -> tuple[Array, Array]:
    """Logits of pictures [B, D] with their own captions [B] and their near misses [B, M]."""
    ids = jnp.concatenate([batch.inputs['text'][:, None], batch.inputs['near']], 1)
    B, M, T = ids.shape
    length = jnp.concatenate([batch.inputs['text_length'][:, None], batch.inputs['near_length']], 1)
    if share := self.config.model.hide:

      def draw(key: Array) -> Array:
        hides, where = jax.random.split(key)
        return jax.random.bernoulli(where, share, (T,)) & jax.random.bernoulli(hides)

      hidden = rng_lib.per_example(draw, rng, 'hide', batch.example)
      ids = jnp.where(hidden[:, None], bpe.UNK, ids)
    if self.config.model.blind:
      coloured = self._blind(batch, rng)[:, None, None] & jnp.isin(ids, self._colours)
      ids = jnp.where(coloured, bpe.UNK, ids)
    vectors = apply(ids.reshape(B * M, T), length.reshape(B * M), method='embed_text')
    logits = apply(images, vectors.reshape(B, M, -1), method='own_logits')
    return logits[:, 0], logits[:, 1:]

  def tokens(self, stage: Stage) -> int:
    """Patches and caption tokens."""
    c = self.config.model.siglip
    return c.patches + self._captions * self.config.data.text_length

  @property
  def _captions(self) -> int:
    """Captions that are embedded for each picture: near misses are ranked beside its own."""
    misses = self.config.data.near_misses
    return 2 + misses if misses else 1


def captioned_images(config: Config, batch_size: int) -> BatchSpec:
  """The batch of systems that read images and captions, and near misses where there are any."""
  B, R, T = batch_size, config.data.image_size, config.data.text_length
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  inputs = {'text': ints(B, T), 'text_length': ints(B)}
  inputs['image'] = jax.ShapeDtypeStruct((B, R, R, 3), jnp.uint8)
  if M := config.data.near_misses:
    inputs |= {'near': ints(B, M, T), 'near_length': ints(B, M)}
  return BatchSpec(inputs)


def build(config: Config) -> System:
  """The system of a config."""
  return System(config)
