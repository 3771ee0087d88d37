"""Class to image by flow matching: Transfusion, with and without a visual prompt.

Imagine Before You Draw (arXiv 2606.04457) forks a run of the baseline `[cls] x`: one branch
continues unchanged, the other inserts the codes of a visual prompt, `[cls] s_1 .. s_P x`, and adds
their cross-entropy at the progressive weight of Eq. 3. Both continue with the optimizer state and
EMA of the parent run (`config.start_weights=state`); the embeddings of the codes are new.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import Config, SampleConfig, check, check_nonnegative, check_sizes
from vpe_jax.contracts import (
  Array,
  Batch,
  Generated,
  Initialization,
  LossTerm,
  Params,
  PretrainedWeights,
  Stage,
  UserError,
)
from vpe_jax.models import transfusion
from vpe_jax.models.decoder import DecoderConfig
from vpe_jax.models.transformer import LAYER_AXES, TransformerConfig
from vpe_jax.objectives import flow_matching, next_token, schedules
from vpe_jax.objectives.flow_matching import FlowConfig
from vpe_jax.sampling.settings import FlowSampling, TokenSampling
from vpe_jax.systems.vpe import class_to_image, transfusion_sampler
from vpe_jax.systems.vpe.codec_sections import LatentCodecs
from vpe_jax.systems.vpe.image_system import ImageSystem

_CODE_LOSSES = ('accuracy', 'next_token')
_QWEN = {'vocabulary': 151_936, 'tied': True, 'context': 32_768}  # Qwen2.5-0.5B without its layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(LatentCodecs):
  """The `model` section.

  Attributes:
    classes: number of classes.
    latent_size: side of the latent grid.
    latent_channels: channels of a latent.
    patch: side of the latent patch that one image token covers.
    body: the layers.
    drop: share of examples with the null class and no visual prompt, the null branch of guidance;
      with 0 there is no null class.
    vp_schedule: how the weight of the visual prompt's cross-entropy grows: `sigmoid` (Eq. 3),
      `linear`, `constant` (`ce_start` at every step) or `off` (1 at every step).
    ce_start: weight at the start of the stage (lambda_0).
    ce_end: weight at the end of the stage (lambda_1).
    flow: training times and target of the flow.
    init_from: a Qwen2.5-0.5B whose layers and last norm initialize the body: a folder in the
      released layout, an import, or a hub id (empty: random initialization).
    logits_chunk: predicted codes whose logits exist at a time (0: all).
  """

  classes: int
  latent_size: int
  latent_channels: int
  patch: int
  body: TransformerConfig
  drop: float = 0.0
  vp_schedule: str = 'sigmoid'
  ce_start: float = 0.03
  ce_end: float = 0.1
  flow: FlowConfig = FlowConfig()
  init_from: str = ''
  logits_chunk: int = 0

  def __post_init__(self) -> None:
    check_sizes(self, 'model.', logits_chunk=0)
    check_nonnegative(self, 'model.', 'ce_start', 'ce_end')
    check(self, 'model.', 'drop', 0 <= self.drop <= 1, 'between 0 and 1')
    listed = f'one of {", ".join(schedules.KINDS)}'
    check(self, 'model.', 'vp_schedule', self.vp_schedule in schedules.KINDS, listed)
    if self.latent_channels != self.image_channels:
      raise UserError(
        f'model.latent_channels is {self.latent_channels}, but the frozen codec has '
        f'{self.image_channels}: set them equal'
      )


@dataclasses.dataclass(frozen=True)
class Sampling(FlowSampling, TokenSampling):
  """Settings of the visual prompt's tokens and of the image's flow."""


class System(ImageSystem):
  """The system `c2i_continuous`; see vpe_jax.contracts.System."""

  plan_rankers = ('likelihood',)  # A class is a number, which a text tower can't embed.
  logical_axes = (
    (r'embed/(classes|prefix)', ('vocab', 'embed')),
    (r'time/hidden/kernel', (None, 'embed')),
    (r'time/out/kernel', ('mlp', 'embed')),
    (r'latents/in/kernel', (None, 'embed')),
    (r'latents/out/kernel', ('embed', None)),
    (r'latents/out/bias', (None,)),
    (r'(time/\w+|latents/in)/bias', ('embed',)),
    *((rf'layers/{path}', axes) for path, axes in LAYER_AXES),
    (r'norm/scale', ('embed',)),
  )

  def __init__(self, config: Config) -> None:
    c: ModelConfig = config.model
    losses = {'flow': 1.0}
    if c.vpe:
      weight = schedules.Schedule(c.vp_schedule, config.steps[0], c.ce_start, c.ce_end, off=1.0)
      losses |= {'next_token': weight, 'accuracy': 0.0}
    super().__init__(
      config,
      (class_to_image.train_stage(config, losses),),
      class_to_image.capabilities(config),
      c.image.codec(),
      ('model.classes', c.classes),
    )
    self.check_image_size()
    self._check_guidance(config.sample)
    sizes = transfusion.TransfusionConfig(
      classes=c.classes + bool(c.drop),
      prefix_codes=self.codes,
      prefix_tokens=c.visual_prompt_tokens,
      latent_size=c.latent_size,
      latent_channels=c.latent_channels,
      patch=c.patch,
      body=c.body,
    )
    self.model = transfusion.Transfusion(
      sizes, jnp.dtype(config.dtype), config.remat, config.attention
    )

  @property
  def initialization(self) -> Initialization:
    """Layers of the language model in `model.init_from`; a fork adds embeddings of codes."""
    c = self.config.model
    if not c.init_from:
      return Initialization(optional=('embed/prefix',))
    sizes = DecoderConfig(body=c.body, **_QWEN)
    paths = (('layers/', 'layers/'), ('norm/', 'norm/'))
    pretrained = (PretrainedWeights('qwen2', c.init_from, sizes, paths),)
    return Initialization(pretrained, optional=('embed/prefix',))

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """Latent elements, and predicted codes: those of visual prompts that aren't dropped."""
    del step, stage
    c = self.model.config
    elements = batch.example.shape[0] * c.latent_size**2 * c.latent_channels
    counts = {'flow': jnp.float32(elements)}
    if c.prefix_tokens:
      examples = jnp.sum(self._keep(batch, rng), dtype=jnp.float32)
      counts |= dict.fromkeys(_CODE_LOSSES, c.prefix_tokens * examples)
    return {name: counts[name] for name in sorted(counts)}

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """`flow`; with a visual prompt also `next_token` (nats) and its `accuracy` (only logged)."""
    if self.config.unroll:
      params = self.model.prepare(params)
    encoded = self.encoded(frozen, batch, rng)
    codes, latents = encoded.get('visual_prompt'), encoded['latents']
    c, keep = self.config.model, self._keep(batch, rng)
    # The null class has the index c.classes. With drop=0 it doesn't exist and is never selected.
    classes = jnp.where(keep, batch.inputs['text'][:, 0], c.classes)
    image_tokens = self.model.config.image_tokens
    x, time, target = flow_matching.noised(latents, c.flow, rng, batch.example, image_tokens)
    hidden, velocity = self.model(params, classes, codes, keep, (x, time))
    counts = self.counts(batch, rng, step, stage)
    error = flow_matching.loss(c.flow, velocity, target, time)
    terms = {'flow': LossTerm(error, counts['flow'], stage.weight('flow', step))}
    if c.vpe:
      table = params['embed']['prefix']
      weights = jnp.broadcast_to(keep[:, None].astype(jnp.float32), codes.shape)
      loss, hits = next_token.cross_entropy(hidden[:, :-1], table, codes, weights, c.logits_chunk)
      weight = stage.weight('next_token', step)
      terms['next_token'] = LossTerm(loss, counts['next_token'], weight)
      terms['accuracy'] = LossTerm(hits, counts['accuracy'], 0.0)
    return {name: terms[name] for name in sorted(terms)}

  def generate(
    self, params: Params, frozen: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> Generated:
    """Samples the visual prompt, then renders; see contracts.Samples and transfusion_sampler.py.

    Raises:
      UserError: the settings have guidance, and the model has no null class.
    """
    self._check_guidance(settings)
    visual_prompt, latents = transfusion_sampler.sample(
      self.model, settings, params, request, rng, self.config.model.flow
    )
    image = self.image.decode(frozen, latents, rng)
    return Generated(image, visual_prompt | {'latents': latents})

  def _check_guidance(self, settings: SampleConfig) -> None:
    """Raises UserError for guidance without a null class; called before training, too."""
    if settings.guidance != 1.0 and not self.config.model.drop:
      raise UserError(
        f'sample.guidance is {settings.guidance:g}, but this model was trained without a null '
        'class (model.drop=0): set sample.guidance=1'
      )

  def draft(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> dict[str, Array]:
    """Visual prompts [B, P]; the image isn't rendered."""
    return transfusion_sampler.prefill(self.model, settings, params, request, rng)[0]

  def plan_likelihood(self, params: Params, request: Batch) -> Array:
    """Mean log-probability of the visual prompts given the classes: [B], nats."""
    return transfusion_sampler.plan_likelihood(self.model, params, request)

  def tokens(self, stage: Stage) -> int:
    """Tokens of a sequence."""
    del stage
    return self.model.config.first + self.model.config.image_tokens

  def _keep(self, batch: Batch, rng: Array) -> Array:
    """Which examples keep class and visual prompt: bool [B]."""
    draw = lambda key: jax.random.uniform(key) >= self.config.model.drop
    return rng_lib.per_example(draw, rng, 'drop', batch.example)


def build(config: Config) -> System:
  """The system of a config."""
  return System(config)
