"""The SigLIP system: image and text towers trained with the sigmoid loss.

It has one stage, `align`. With another seed and patch size it also trains the evaluator network,
which scores generated images and takes no part in the training of any generator.
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
from vpe_jax.data.tokenizers.published import open_tokenizer
from vpe_jax.models import siglip
from vpe_jax.objectives import alignment

# Parameters of models/vit.py; the decoder in systems/tokenizers/codec.py has the same ones.
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
  """The `model` section: sizes of the towers, and augmentation of the training pairs.

  Attributes:
    siglip: sizes of both towers.
    jitter: random shift and zoom of training images.
    mask_tokens: share of tokens that are masked in a caption and its near misses, at the same
      positions, before they are ranked. It applies to a random half of the images. A masked
      caption is still true of its image, so the towers learn each word by itself and generalize to
      unseen combinations of words.
    recolour: share of images whose colour channels are permuted, among those whose caption names a
      colour. Their colour words are masked before the ranking, so the towers learn shapes in every
      colour. A caption without colours fits many images, so these pairs are left out of the
      sigmoid loss.
    init_from: SigLIP weights to start from: a folder saved by transformers, an import, or a hub id
      (empty: random initialization).
  """

  siglip: siglip.SiglipConfig = siglip.SiglipConfig()
  jitter: pixels.Jitter = pixels.Jitter()
  mask_tokens: float = 0.0
  recolour: float = 0.0
  init_from: str = ''

  def __post_init__(self) -> None:
    for name in ('mask_tokens', 'recolour'):
      check(self, 'model.', name, 0 <= getattr(self, name) <= 1, 'between 0 and 1')


Sampling = SampleConfig  # the system does not sample


class System(SystemProtocol):
  """Trains the towers of models/siglip.py; see vpe_jax.contracts.System."""

  logical_axes = (
    *ENCODER_AXES,
    (r'text/token', ('vocab', 'embed')),
    (r'vision/embed/kernel', ('features', 'embed')),
    (r'vision/pooling/probe', (None, 'embed')),
    (r'text/head/kernel', ('embed', 'features')),
    (r'(bias|scale)', ('embed',)),
  )

  def __init__(self, config: Config):
    """Builds the towers of a config.

    Raises:
      UserError: captions are longer than the text tower allows, a stage is unknown, or words are to
        be masked by a tokenizer without `[unk]`.
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
    if config.model.mask_tokens or config.model.recolour:
      _check_masking(config.data.tokenizer)

  def _stage(self, name: str) -> Stage:
    if name != 'align':
      raise UserError(f"the siglip system has no stage '{name}': its only stage is 'align'")
    losses = {'sigmoid': 1.0, 'retrieval': 0.0}
    if self.config.data.near_misses:
      losses |= {'near': 1.0, 'near_retrieval': 0.0}
    return Stage(name, ('.*',), losses, ema=True)

  @property
  def initialization(self) -> Initialization:
    """Published towers if `model.init_from` names them."""
    c = self.config.model
    if not c.init_from:
      return Initialization()
    return Initialization((PretrainedWeights('siglip', c.init_from, c.siglip, (('', ''),)),))

  @functools.cached_property
  def preprocess(self) -> PromptAndImage:
    """Caption tokens, images and near misses."""
    rows = self.config.model.siglip.vocabulary
    return prompt_and_image(self.config.data, 'model.siglip.vocabulary', rows)

  @functools.cached_property
  def _colour_ids(self) -> np.ndarray:
    """Sorted ids of the tokens of colour words."""
    words = ' '.join((*shapes.COLOURS, *shapes.TINTS))
    return np.unique(self.preprocess.tokenizer.encode(words)).astype(np.int32)

  def init(self, rng: Array) -> Params:
    """Random initial towers."""
    c = self.config.model.siglip
    images = jnp.zeros((1, c.image_size, c.image_size, 3))
    ids, length = jnp.zeros((1, c.text_length), jnp.int32), jnp.ones((1,), jnp.int32)
    return self.network.init(rng, images, ids, length)['params']

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """Images and captions."""
    return captioned_images(self.config, batch_size)

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """Images that are not recoloured; for `near` and `near_retrieval`, images with near misses."""
    unchanged = ~self._recoloured(batch, rng)
    counts = dict.fromkeys(stage.losses, jnp.sum(unchanged, dtype=jnp.float32))
    if 'near' in stage.losses:
      with_misses = jnp.sum(jnp.any(batch.inputs['near_length'] > 0, -1), dtype=jnp.float32)
      counts['near'] = counts['near_retrieval'] = with_misses
    return counts

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """The sigmoid loss over all pairs of the batch, and in-batch retrieval (logged only).

    With gradient accumulation, the pairs are those within a microbatch. Near misses
    (`data.near_misses`) are compared with their own image only: `near` is the loss of ranking its
    caption among them, `near_retrieval` (logged only) the share of images whose own caption has the
    largest logit.
    """
    model, variables = self.config.model, {'params': params}
    views = pixels.jittered_view(
      batch.inputs['image'], model.siglip.image_size, model.jitter, rng, batch.example
    )
    recoloured = self._recoloured(batch, rng)
    if model.recolour:
      permuted = pixels.permute_channels(views, rng, batch.example)
      views = jnp.where(recoloured[:, None, None, None], permuted, views)
    apply = functools.partial(self.network.apply, variables)
    text, length = batch.inputs['text'], batch.inputs['text_length']
    images = apply(pixels.to_signed(views), method='embed_images')
    captions = apply(text, length, method='embed_text')
    logits = apply(images, captions, method='logits')
    positive, unchanged = alignment.same_caption(text), ~recoloured
    loss = alignment.sigmoid_loss(logits, positive, unchanged[:, None] & unchanged)
    hits = alignment.retrieval_hits(jnp.where(unchanged, logits, -jnp.inf), positive) * unchanged
    values = {'sigmoid': loss, 'retrieval': hits}
    if 'near' in stage.losses:
      own, wrong = self._ranking_logits(apply, images, batch, rng)
      present = batch.inputs['near_length'] > 0
      values['near'] = alignment.near_loss(own, wrong, present)
      values['near_retrieval'] = alignment.near_hits(own, wrong, present)
    counts, weight = self.counts(batch, rng, step, stage), lambda name: stage.weight(name, step)
    return {n: LossTerm(jnp.sum(value), counts[n], weight(n)) for n, value in values.items()}

  def _recoloured(self, batch: Batch, rng: Array) -> Array:
    """Which images have permuted colour channels: bool [B]."""
    share = self.config.model.recolour
    if not share:
      return jnp.zeros(batch.example.shape, bool)
    sample = lambda key: jax.random.bernoulli(key, share)
    selected = rng_lib.per_example(sample, rng, 'blind', batch.example)
    return selected & jnp.any(jnp.isin(batch.inputs['text'], self._colour_ids), -1)

  def _ranking_logits(
    self, apply: Callable[..., Array], images: Array, batch: Batch, rng: Array
  ) -> tuple[Array, Array]:
    """Logits of images [B, D] with their own captions [B] and with their near misses [B, M]."""
    ids = jnp.concatenate([batch.inputs['text'][:, None], batch.inputs['near']], 1)
    B, M, T = ids.shape
    length = jnp.concatenate([batch.inputs['text_length'][:, None], batch.inputs['near_length']], 1)
    if share := self.config.model.mask_tokens:

      def sample_mask(key: Array) -> Array:
        image_key, token_key = jax.random.split(key)
        return jax.random.bernoulli(token_key, share, (T,)) & jax.random.bernoulli(image_key)

      mask = rng_lib.per_example(sample_mask, rng, 'hide', batch.example)
      ids = jnp.where(mask[:, None], bpe.UNK, ids)
    if self.config.model.recolour:
      recoloured = self._recoloured(batch, rng)[:, None, None]
      ids = jnp.where(recoloured & jnp.isin(ids, self._colour_ids), bpe.UNK, ids)
    vectors = apply(ids.reshape(B * M, T), length.reshape(B * M), method='embed_text')
    logits = apply(images, vectors.reshape(B, M, -1), method='own_logits')
    return logits[:, 0], logits[:, 1:]

  def tokens(self, stage: Stage) -> int:
    """Patches and caption tokens."""
    c = self.config.model.siglip
    return c.patches + self._captions * self.config.data.text_length

  @property
  def _captions(self) -> int:
    """Captions embedded per image; with near misses, the image's own caption is embedded twice."""
    misses = self.config.data.near_misses
    return 2 + misses if misses else 1


def _check_masking(tokenizer: str) -> None:
  """Raises a UserError unless `data.tokenizer` has the token that replaces masked ones."""
  if not isinstance(open_tokenizer(tokenizer), bpe.Tokenizer):
    raise UserError(
      f'model.mask_tokens and model.recolour replace tokens by [unk], which data.tokenizer='
      f'{tokenizer} lacks: set both to 0, or data.tokenizer to assets:bpe or bpe:FILE'
    )


def captioned_images(config: Config, batch_size: int) -> BatchSpec:
  """The batch of systems that read images and captions, with near misses if the data has them."""
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
