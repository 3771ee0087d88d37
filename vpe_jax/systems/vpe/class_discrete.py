"""Class to image in discrete codes: LlamaGen's GPT, with and without a visual prompt.

Imagine Before You Draw (arXiv 2606.04457) puts the codes of a visual prompt between the class and
the image's codes: `[cls] s_1 .. s_P z_1 .. z_N`, without separators. In training each s_j is
masked with a probability that falls over the steps (Eq. 2): a pad embedding replaces it, and it has
no loss. Early on, the network learns to generate from the class alone, later from the visual
prompt that it has learned to write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import Config, SampleConfig, check, check_sizes
from vpe_jax.contracts import Array, Batch, Generated, LossTerm, Params, Stage
from vpe_jax.models import llamagen
from vpe_jax.models.dropout import Dropout
from vpe_jax.models.transformer import LAYER_AXES, TransformerConfig
from vpe_jax.objectives import next_token, schedules
from vpe_jax.sampling.settings import TokenSampling, check_scales
from vpe_jax.systems.vpe import class_to_image, llamagen_sampler
from vpe_jax.systems.vpe.codec_sections import ImageCodeCodecs
from vpe_jax.systems.vpe.image_system import ImageSystem

_LOSSES = {'accuracy': 0.0, 'next_token': 1.0}
_VISUAL_PROMPT_LOSSES = {'masked': 0.0, 'image': 0.0, 'plan': 0.0}  # of models with a visual prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(ImageCodeCodecs):
  """The `model` section; the sizes of the grids and of the vocabularies are those of the codecs.

  Attributes:
    classes: number of classes.
    body: the layers.
    positions: `grid` or `line`, see models.llamagen.
    class_rotation: rotary embedding of the class token, `identity` or `zero`; see models.llamagen.
    drop: share of examples with the null class, the null branch of guidance.
    token_dropout: dropout rate of the embeddings, element by element; see models.dropout.
    residual_dropout: dropout rate of each layer's attention output.
    mlp_dropout: dropout rate of each layer's MLP output.
    vp_schedule: decay of the probability of masking a code of the visual prompt: `sigmoid` (the
      paper's), `linear`, `constant` (`mask_start` at every step) or `off` (no masking).
    mask_start: probability at the start of the stage (p_0 of Eq. 2).
    mask_end: probability at the end of the stage (p_1).
    mask_by: unit of masking: a `token`, or the whole visual prompt of a `sample`.
    logits_chunk: predicted tokens whose logits exist at a time (0: the whole visual prompt, then
      the whole image).
  """

  classes: int
  body: TransformerConfig
  positions: str = 'grid'
  class_rotation: str = 'identity'
  drop: float = 0.1
  token_dropout: float = 0.0
  residual_dropout: float = 0.0
  mlp_dropout: float = 0.0
  vp_schedule: str = 'sigmoid'
  mask_start: float = 0.95
  mask_end: float = 0.05
  mask_by: str = 'token'
  logits_chunk: int = 0

  def __post_init__(self) -> None:
    check_sizes(self, 'model.', logits_chunk=0)
    for name in ('drop', 'mask_start', 'mask_end'):
      check(self, 'model.', name, 0 <= getattr(self, name) <= 1, 'between 0 and 1')
    for name in ('token_dropout', 'residual_dropout', 'mlp_dropout'):
      check(self, 'model.', name, 0 <= getattr(self, name) < 1, 'at least 0 and below 1')
    for name, known in (('vp_schedule', schedules.KINDS), ('mask_by', ('token', 'sample'))):
      listed = f'one of {", ".join(known)}'
      check(self, 'model.', name, getattr(self, name) in known, listed)

  @property
  def dropout(self) -> Dropout:
    """Dropout rates of a training step."""
    return Dropout(self.token_dropout, self.residual_dropout, self.mlp_dropout)


@dataclasses.dataclass(frozen=True)
class Sampling(TokenSampling):
  """Sampling settings of visual-prompt and image tokens.

  Attributes:
    guidance: classifier-free guidance scale of the image; 1 is off, 0 is unconditional.
    plan_guidance: classifier-free guidance scale of the visual prompt's logits; 1 is off.
  """

  guidance: float = 3.0
  plan_guidance: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check_scales(self, 'guidance', 'plan_guidance')


class System(ImageSystem):
  """The system `c2i_discrete`; see vpe_jax.contracts.System."""

  plan_rankers = ('likelihood',)  # A class is a number, which a text tower can't embed.

  logical_axes = (
    (r'embed/(classes|codes|prefix)', ('vocab', 'embed')),
    (r'embed/pad', (None, 'embed')),
    *((rf'layers/{path}', axes) for path, axes in LAYER_AXES),
    (r'norm/scale', ('embed',)),
    (r'head/kernel', ('embed', 'vocab')),
  )

  def __init__(self, config: Config) -> None:
    c: ModelConfig = config.model
    losses = _LOSSES | (_VISUAL_PROMPT_LOSSES if c.vpe else {})
    super().__init__(
      config,
      (class_to_image.train_stage(config, losses),),
      class_to_image.capabilities(config),
      c.image.codec(config.data.image_size),
      ('model.classes', c.classes),
    )
    sizes = llamagen.LlamaGenConfig(
      classes=c.classes,
      codes=self.image.codes,
      side=self.image.grid,
      body=c.body,
      class_rotation=c.class_rotation,
      prefix_codes=self.codes,
      prefix_side=self.visual_prompt.grid,
      positions=c.positions,
    )
    self.model = llamagen.LlamaGen(
      sizes, jnp.dtype(config.dtype), config.remat, config.attention, c.dropout
    )

  @property
  def codebooks(self) -> dict[str, int]:
    """Codebook sizes of visual prompt, where there is one, and image."""
    return super().codebooks | {'latents': self.image.codes}

  def encoded_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Visual prompts [B, P], where the model has any, and the codes of images [B, h, w]."""
    side = self.model.config.side
    latents = jax.ShapeDtypeStruct((batch_size, side, side), jnp.int32)
    return self.prompt_shapes(batch_size) | {'latents': latents}

  def encode(self, frozen: Params, inputs: Mapping[str, Array], keys: Array) -> dict[str, Array]:
    """Visual prompts, where the model has any, and codes [B, h, w] of images [B, R, R, 3]."""
    encoded = super().encode(frozen, inputs, keys)
    codes = encoded['latents'].reshape(-1, self.image.grid, self.image.grid)
    return encoded | {'latents': codes}

  def decode(self, frozen: Params, encoded: Mapping[str, Array], rng: Array) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of codes [B, h, w]."""
    codes = encoded['latents']
    return self.image.decode(frozen, codes.reshape(codes.shape[0], -1), rng)

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """Predicted tokens: all of the image, and the unmasked ones of the visual prompt."""
    del stage
    B = batch.example.shape[0]
    image, P = jnp.float32(B * self.model.config.image_tokens), self.model.config.prefix_tokens
    if not P:
      return dict.fromkeys(_LOSSES, image)
    unmasked = jnp.sum(~self._masked(batch, rng, step), dtype=jnp.float32)
    counts = dict.fromkeys(_LOSSES, image + unmasked)
    counts |= {'image': image, 'plan': unmasked, 'masked': jnp.float32(B * P)}
    return {name: counts[name] for name in sorted(counts)}

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """The training loss `next_token` (nats), a mean over all unmasked targets.

    The other terms are only logged: `accuracy` of the argmax; with a visual prompt also `plan` and
    `image` (the cross-entropy of each part, each a mean over its own targets), and `masked` (the
    masked share of the visual prompt).
    """
    if self.config.unroll:
      params = self.model.prepare(params)
    encoded = self.encoded(frozen, batch, rng)
    visual_prompt, codes = encoded.get('visual_prompt'), encoded['latents']
    codes = codes.reshape(codes.shape[0], -1)
    P = self.model.config.prefix_tokens
    masked = self._masked(batch, rng, step) if P else None
    x = self.model.inputs(params, self._classes(batch, rng), codes, visual_prompt, masked)
    stream = self.model.stream(x, dropout_keys=self._dropout_keys(batch, rng, stage))
    hidden, _ = self.model.states(params, stream)
    loss, hits = self._cross_entropy(params, hidden[:, P:], codes, jnp.ones(codes.shape))
    sums = {'image': loss}
    if P:
      targets = visual_prompt + self.model.config.codes
      weights = 1.0 - masked.astype(jnp.float32)
      sums['plan'], code_hits = self._cross_entropy(params, hidden[:, :P], targets, weights)
      sums['masked'] = jnp.sum(masked, dtype=jnp.float32)
      loss, hits = loss + sums['plan'], hits + code_hits
    sums |= {'next_token': loss, 'accuracy': hits}
    counts = self.counts(batch, rng, step, stage)
    weight = lambda name: stage.weight(name, step)
    return {name: LossTerm(sums[name], counts[name], weight(name)) for name in counts}

  def generate(
    self, params: Params, frozen: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> Generated:
    """Samples the visual prompt, then the image's codes; see llamagen_sampler.py."""
    visual_prompt, codes = llamagen_sampler.sample(self.model, settings, params, request, rng)
    image = self.image.decode(frozen, codes, rng)
    latents = codes.reshape(codes.shape[0], self.image.grid, -1)
    return Generated(image, visual_prompt | {'latents': latents})

  def draft(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> dict[str, Array]:
    """Visual prompts [B, P]; the image's codes aren't sampled."""
    if not self.codes:
      return {}
    return {'visual_prompt': llamagen_sampler.draft(self.model, settings, params, request, rng)}

  def plan_likelihood(self, params: Params, request: Batch) -> Array:
    """Mean log-probability of the visual prompts given the classes: [B], nats."""
    return llamagen_sampler.plan_likelihood(self.model, params, request)

  def tokens(self, stage: Stage) -> int:
    """Input tokens: all of the sequence except the last."""
    del stage
    return self.model.config.prefix_tokens + self.model.config.image_tokens

  def _masked(self, batch: Batch, rng: Array, step: Array) -> Array:
    """Masked codes of the visual prompts (Eq. 2): bool [B, P]."""
    c, P = self.config.model, self.model.config.prefix_tokens
    total = self.config.steps[0]
    share = schedules.Schedule(c.vp_schedule, total, c.mask_start, c.mask_end, off=0.0).at(step)
    shape = (P,) if c.mask_by == 'token' else (1,)
    draw = lambda key: jax.random.uniform(key, shape)
    values = rng_lib.per_example(draw, rng, 'mask', batch.example)
    return jnp.broadcast_to(values < share, (batch.example.shape[0], P))

  def _dropout_keys(self, batch: Batch, rng: Array, stage: Stage) -> Array | None:
    """One key for each example [B]; None without dropout, as in evaluation."""
    if not (stage.training and self.model.dropout):
      return None
    return rng_lib.example_keys(rng, 'dropout', batch.example)

  def _classes(self, batch: Batch, rng: Array) -> Array:
    """The classes [B], some of them replaced by the null class."""
    c = self.config.model
    draw = lambda key: jax.random.uniform(key) < c.drop
    dropped = rng_lib.per_example(draw, rng, 'drop', batch.example)
    return jnp.where(dropped, c.classes, batch.inputs['text'][:, 0])

  def _cross_entropy(
    self, params: Params, hidden: Array, targets: Array, weights: Array
  ) -> tuple[Array, Array]:
    table, chunk = params['head']['kernel'].T, self.config.model.logits_chunk
    return next_token.cross_entropy(hidden, table, targets, weights, chunk)


def build(config: Config) -> System:
  """The system of a config."""
  return System(config)
