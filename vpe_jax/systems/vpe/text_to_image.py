"""Text to image with visual prompts: Internal+VPE and External+VPE (arXiv 2606.04457).

The model writes a plan of the picture in discrete SigLIP tokens by next-token prediction, then
renders it by flow matching. Two stages: `plan` trains the token expert on cross-entropy alone while
the picture expert is frozen and not run. Then `joint` (`model.arch=internal` or `single`) trains
both experts, flow matching at weight 1 and cross-entropy at the progressive weight of Eq. 3; text
and plan are dropped together for guidance. Or `render` (`model.arch=external`) trains the picture
expert alone, which sees the plan only, on flow matching; the plan is dropped. What differs between
the two is in systems/vpe/internal.py and systems/vpe/external.py. Without visual prompt
(`model.vpe=False`) the picture is drawn from the text alone, in stage `joint`, on flow matching.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.codecs import pixels
from vpe_jax.codecs.feature_vq import FeatureVqSection
from vpe_jax.config import Config, SampleConfig, check, nearest
from vpe_jax.contracts import (
  Array,
  Batch,
  Generated,
  Initialization,
  LossTerm,
  Params,
  PlansVisually,
  PretrainedWeights,
  Region,
  Samples,
  ScoresImages,
  Stage,
  UserError,
)
from vpe_jax.models import unified
from vpe_jax.models.siglip import unit
from vpe_jax.objectives import flow_matching, next_token, schedules
from vpe_jax.objectives.flow_matching import FlowConfig
from vpe_jax.sampling import autoregressive
from vpe_jax.sampling.settings import FlowSampling, TokenSampling, check_scales
from vpe_jax.systems.vpe import layouts, unified_sampler
from vpe_jax.systems.vpe.codec_sections import LatentCodecs
from vpe_jax.systems.vpe.external import External
from vpe_jax.systems.vpe.image_system import DrawingSystem
from vpe_jax.systems.vpe.internal import Internal, Unplanned


@dataclasses.dataclass(frozen=True)
class ModelConfig(unified.UnifiedConfig, LatentCodecs):
  """The network's sizes, the frozen codecs, and how the two losses meet.

  Attributes:
    drop: share of examples whose text and plan are dropped together, in stage `joint`; in `render`
      the plan, as the picture expert never sees the text.
    drop_text: share of examples whose text alone is dropped, in both stages: what the guidance of
      the plan compares with (`sample.plan_guidance`; the paper uses none).
    inherit: standard deviation of text and code rows that start as SigLIP's rows of the same words
      and as the rows of the codebook: what means something alike starts out alike (0: rows are
      drawn at random, as in the paper, whose text rows come from Show-o2). Synthetic codes mean
      nothing: their rows are drawn.
    init_from: a Show-o2 whose language model both experts start from, and the picture expert's
      embedding and head too: a folder in the released layout, an import, or a hub id (empty: all is
      drawn at random). Rows of codes are drawn, as Show-o2 has none.
    vp_schedule: how the weight of the cross-entropy grows in stage `joint` (Eq. 3): `sigmoid` (the
      paper's), `linear`, `constant` (`ce_start` at every step) or `off` (it weighs 1, as the flow).
    ce_start: its weight at the start of the stage (lambda_0).
    ce_end: its weight at the end (lambda_1).
    flow: training times and target of the flow; shifted as Show-o2's by default.
    logits_chunk: predicted tokens whose logits exist at a time (0: all).
  """

  drop: float = 0.1
  drop_text: float = 0.0
  inherit: float = 0.0
  init_from: str = ''
  vp_schedule: str = 'sigmoid'
  ce_start: float = 0.03
  ce_end: float = 0.1
  flow: FlowConfig = FlowConfig(shift_by='resolution')
  logits_chunk: int = 0

  def __post_init__(self) -> None:
    super().__post_init__()
    known = self.vp_schedule in schedules.KINDS
    check(self, 'model.', 'vp_schedule', known, f'one of {", ".join(schedules.KINDS)}')
    for name in ('drop', 'drop_text'):
      check(self, 'model.', name, 0 <= getattr(self, name) <= 1, 'between 0 and 1')
    for name in ('inherit', 'ce_start', 'ce_end'):
      check(self, 'model.', name, getattr(self, name) >= 0, 'at least 0')
    for name in ('bos', 'boi'):
      known = getattr(self, name) < self.text_vocab
      check(self, 'model.', name, known, f'below text_vocab={self.text_vocab}')
    pairs = {
      'codes': (self.codes, self.plan_codes),
      'latent_channels': (self.latent_channels, self.image_channels),
    }
    for name, (ours, codec) in pairs.items():
      if ours != codec and (name != 'codes' or self.vpe):
        raise UserError(f'model.{name} is {ours}, but its frozen codec has {codec}: set them equal')
    if not self.vpe and self.arch == 'external':
      raise UserError(
        'model.arch=external draws from a visual prompt alone, and model.vpe=False leaves it out: '
        'set model.vpe=True, or another model.arch'
      )
    if self.inherit and not self.vpe:
      raise UserError(
        'model.inherit takes rows from the codecs of the visual prompt, and model.vpe=False leaves '
        'them out: set model.inherit=0'
      )
    if self.inherit and not isinstance(self.visual_prompt, FeatureVqSection):
      raise UserError(
        'model.inherit takes rows from a quantiser that was trained here, and '
        f'model.visual_prompt.kind={self.visual_prompt.kind} is none: set model.inherit=0'
      )
    if self.inherit and self.visual_prompt.encoder != 'siglip':
      raise UserError(
        'model.inherit takes text rows from the embedded SigLIP, and '
        f'model.visual_prompt.encoder={self.visual_prompt.encoder} takes its place: set '
        'model.inherit=0'
      )
    if self.inherit and self.text_vocab != self.visual_prompt.siglip.vocabulary:
      raise UserError(
        f'model.inherit takes text rows from a SigLIP of {self.visual_prompt.siglip.vocabulary} '
        f'words, but model.text_vocab is {self.text_vocab}: set them equal, or model.inherit=0'
      )


@dataclasses.dataclass(frozen=True)
class Sampling(FlowSampling, TokenSampling):
  """Settings of the visual prompt's tokens and of the image's flow.

  Attributes:
    plan_guidance: classifier-free guidance scale of the visual prompt's logits; 1 is off. It needs
      a model that was trained with `model.drop_text`.
  """

  plan_guidance: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check_scales(self, 'plan_guidance')


class System(DrawingSystem):
  """See vpe_jax.contracts.System."""

  samples_with = ('image',)

  def __init__(self, config: Config) -> None:
    c: ModelConfig = config.model
    sizes = c if c.vpe else dataclasses.replace(c, codes=0)
    self.config = config
    self.codes = sizes.codes
    self.logical_axes = unified.LOGICAL_AXES
    self.model = unified.Unified(sizes, jnp.dtype(config.dtype), config.remat, config.attention)
    self.visual_prompt = c.prompt_codec(jnp.dtype(config.dtype))
    self.image = c.image.codec()
    self.table = ('model.text_vocab', c.text_vocab)
    # Published tokenizers and towers come without a text tower of our words to compare with.
    tower = c.visual_prompt
    embedded = c.vpe and isinstance(tower, FeatureVqSection) and tower.encoder == 'siglip'
    # The pooling head reads the last output alone, and the text tower its own words.
    compares = embedded and tower.has_text_tower and c.text_vocab <= tower.siglip.vocabulary
    self.plan_rankers = ('likelihood', 'similarity') if compares else ('likelihood',)
    self.drafts = ('visual_prompt',) if c.vpe else ()
    self.capabilities = (
      Samples,
      *((PlansVisually,) if c.vpe else ()),
      *((ScoresImages,) if embedded else ()),
    )
    self.vocabulary = layouts.Vocabulary(c.text_vocab, self.codes, c.bos, c.boi)
    self.rows = self._rows()
    self.layout = self.rows.layout
    _check_stages(config, tuple(self.rows.stages))
    self.stages = tuple(map(self._stage, config.stages, config.steps))

  def _rows(self) -> Internal | External:
    c = self.config.model
    if c.references:
      raise UserError('model.references is of configs/edit.py: nothing here sees a picture before')
    given = (self.model, self.vocabulary, self.config.data.text_length, c.plan_tokens, c.flow)
    if c.arch == 'external':
      return External(*given)
    return (Internal if c.vpe else Unplanned)(*given)

  def _stage(self, name: str, steps: int) -> Stage:
    """A stage of the rows; beside the flow the cross-entropy has the weight of Eq. 3."""
    stage, c = self.rows.stages[name], self.config.model
    if not {'next_token', 'flow'} <= stage.losses.keys():
      return stage
    weight = schedules.Schedule(c.vp_schedule, steps, c.ce_start, c.ce_end, off=1.0)
    return dataclasses.replace(stage, losses={**stage.losses, 'next_token': weight})

  @property
  def initialization(self) -> Initialization:
    """Show-o2, where `model.init_from` names one; token rows from the codecs (`model.inherit`).

    A visual prompt that was learned for another condition serves this one: the parent run may lack
    the cross-attention.
    """
    return Initialization(
      self._published(),
      optional=('dit/layers/cross/',),
      from_frozen=(('embed/', 'the codecs'),) if self._inherits else (),
    )

  def _published(self) -> tuple[PretrainedWeights, ...]:
    """Show-o2, where `model.init_from` names one: its language model goes to both experts."""
    c = self.config.model
    if not c.init_from:
      return ()
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(unified.UnifiedConfig)}
    fields |= {'arch': 'single', 'dit': c.ar, 'codes': 0, 'references': False}
    copies = () if c.arch == 'single' else (('ar/', 'dit/'),)
    paths = (('embed/text', 'embed/text'), ('ar/', 'ar/'), *copies, ('dit/', 'dit/'))
    sizes = unified.UnifiedConfig(**fields)
    return (PretrainedWeights('showo2', c.init_from, sizes, paths),)

  def inherit(self, params: Params, frozen: Params, rng: Array) -> Params:
    """Text and code rows from the frozen networks, where `model.inherit` asks for it."""
    if not self._inherits:
      return params
    embed, keys = params['embed'], jax.random.split(rng)
    text = self._turned(frozen['siglip']['text']['token'], keys[0])
    codes = self._turned(unit(frozen['feature_vq']['codebook']), keys[1])
    embed = embed | {'text': text, 'codes': embed['codes'].at[: self.codes].set(codes)}
    return params | {'embed': embed}

  @property
  def _inherits(self) -> bool:
    return bool(self.config.model.inherit and self.frozen)

  def _turned(self, rows: Array, key: Array) -> Array:
    """Rows [V, W] without their mean, at the model's width: distances stay in proportion."""
    width = self.config.model.ar.width
    turn = jax.random.orthogonal(key, max(width, rows.shape[1]))[: rows.shape[1], :width]
    rows = rows.astype(jnp.float32)
    rows = jnp.einsum('VW,WD->VD', rows - jnp.mean(rows, 0), turn)
    return self.config.model.inherit * rows / jnp.std(rows)

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """Predicted tokens, and latent elements, of the batch."""
    c = self.config.model
    B = batch.example.shape[0]
    dummy = jnp.zeros((B, c.plan_tokens), jnp.int32)
    regions = self._regions(batch, dummy, self._keep(batch, rng, stage))
    counts = {}
    if 'next_token' in stage.losses:
      counts['next_token'] = counts['accuracy'] = jnp.sum(regions['ar'].weights)
    if 'flow' in stage.losses:
      elements = B * c.latent_size**2 * c.latent_channels
      counts['flow'] = jnp.float32(elements)
    return {name: counts[name] for name in sorted(counts)}

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """`next_token` (nats) with `accuracy` of its argmax (logged), and `flow`: the stage's own."""
    if self.config.unroll:
      params = self.model.prepare(params)
    batch = self._encoded(frozen, batch, rng)
    codes = self._visual_prompts(batch)
    regions = self._regions(self._told(batch, rng), codes, self._keep(batch, rng, stage))
    counts = self.counts(batch, rng, step, stage)
    terms, noisy = {}, None
    if 'flow' in stage.losses:
      noisy, target = self._noisy(batch, batch.encoded['latents'], rng)
    hidden, velocity = self._forward(params, regions, noisy, batch)
    if noisy is not None:
      # The network's velocity is Show-o2's, data minus noise, and its clock is 1 at the data.
      flow = self.config.model.flow
      error = flow_matching.loss(flow, -velocity, target, 1.0 - noisy[1])
      terms['flow'] = LossTerm(error, counts['flow'], stage.weight('flow', step))
    if 'next_token' in stage.losses:
      loss, hits = self._next_token(params, hidden, regions['ar'])
      weight = stage.weight('next_token', step)
      terms['next_token'] = LossTerm(loss, counts['next_token'], weight)
      terms['accuracy'] = LossTerm(hits, counts['accuracy'], 0.0)
    return {name: terms[name] for name in sorted(terms)}

  def generate(
    self, params: Params, frozen: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> Generated:
    """Plans, then renders; see vpe_jax.contracts.System and systems/vpe/unified_sampler.py."""
    codes, latents = self.rows.draw(params, request, rng, settings)
    encoded = {'visual_prompt': codes} if self.codes else {}
    image = self.image.decode(frozen, latents, rng)
    return Generated(image, encoded | {'latents': latents})

  def draft(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> dict[str, Array]:
    """Visual prompts [B, P]; the image expert isn't run."""
    if not self.codes:
      return {}
    return {'visual_prompt': unified_sampler.decode(self.rows, settings, params, request, rng)[0]}

  def plan_likelihood(self, params: Params, request: Batch) -> Array:
    """The mean log-probability of the plans given the texts: [B], nats."""
    keep = jnp.ones(request.example.shape, bool)
    codes = request.encoded['visual_prompt']
    regions = self._regions(request, codes, keep)
    hidden, _ = self._forward(params, regions, None, request)
    first, last = self.layout.place('bot')[0], self.layout.place('codes')[1]
    # The slot before each code predicts it.
    logits = self.model.code_logits(params, hidden[:, first : last - 1])
    return autoregressive.log_likelihood(logits, codes)

  def plan_similarity(self, frozen: Params, request: Batch) -> Array:
    """Cosines [B] of SigLIP's pooled vector of each visual prompt and its text vector."""
    image = self.visual_prompt.embed_codes(frozen, request.encoded['visual_prompt'])
    text = (request.inputs['text'], request.inputs['text_length'])
    return jnp.einsum('BD,BD->B', image, self.visual_prompt.embed_text(frozen, *text))

  def similarity(self, frozen: Params, images: Array, inputs: Mapping[str, Array]) -> Array:
    """Cosines [B, B] of images [B, R, R, 3] in [0, 1] and captions, by the frozen SigLIP."""
    siglip = self.visual_prompt.siglip
    side = self.config.model.visual_prompt.siglip.image_size
    variables = {'params': frozen['siglip']}
    seen = pixels.to_signed(pixels.view(images, side))
    image = siglip.apply(variables, seen, method='embed_images')
    caption = self.visual_prompt.embed_text(frozen, inputs['text'], inputs['text_length'])
    return jnp.einsum('BD,VD->BV', image, caption)

  def flops(self, stage: Stage) -> float:
    """Matrix FLOPs of one example, forward and what trains backward; see contracts.System."""
    predicted = self.config.model.plan_tokens + 1
    return self.rows.train_flops(stage, predicted) + self.encoder_flops(stage)

  def encoder_flops(self, stage: Stage) -> float:
    """Matrix FLOPs of the frozen encoders for one example: those that the stage needs, online."""
    # Without a flow loss nothing reads the latents, and their encoder is compiled away.
    used = ('visual_prompt', 'latents') if 'flow' in stage.losses else ('visual_prompt',)
    key = rng_lib.run_key(0)

    def encode(frozen: Params, image: Array) -> dict[str, Array]:
      encoded = self.encode(frozen, {'image': image, 'source_image': image}, key)
      return {name: leaf for name, leaf in encoded.items() if name in used}

    return self._online_flops(encode)

  def attention_flops(self, stage: Stage) -> float:
    """Of the forward pass, what attention amounts to: see unified.attention_flops."""
    return sum(self.rows.attention_flops(stage))

  def frozen_attention_flops(self, stage: Stage) -> float:
    """Of these, what no gradient goes back through."""
    return self.rows.attention_flops(stage)[0]

  def tokens(self, stage: Stage) -> int:
    """Tokens of both experts, or of the token expert alone in stage `plan`."""
    return self.rows.tokens(stage)

  def _encoded(self, frozen: Params, batch: Batch, rng: Array) -> Batch:
    """The batch with all encoded entries: its own, or computed from its images."""
    return dataclasses.replace(batch, encoded=self.encoded(frozen, batch, rng))

  def _visual_prompts(self, batch: Batch) -> Array:
    """Visual prompts [B, P] of a batch; P = 0 where the model has none."""
    none = jnp.zeros((batch.example.shape[0], 0), jnp.int32)
    return batch.encoded.get('visual_prompt', none)

  def _forward(
    self,
    params: Params,
    regions: dict[str, Region],
    noisy: tuple[Array, Array] | None,
    batch: Batch,
  ) -> tuple[Array, Array | None]:
    """The rows' `forward`, with what else it reads of the batch."""
    return self.rows.forward(params, regions, noisy, batch.encoded.get('source_latents'))

  def _regions(self, batch: Batch, codes: Array, keep: Array) -> dict[str, Any]:
    return self.rows.regions(batch, codes, keep)

  def _keep(self, batch: Batch, rng: Array, stage: Stage) -> Array:
    """Which examples keep their condition: all where no flow loss would use the null branch."""
    if 'flow' not in stage.losses:
      return jnp.ones(batch.example.shape, bool)
    draw = lambda key: jax.random.uniform(key) >= self.config.model.drop
    return rng_lib.per_example(draw, rng, 'drop', batch.example)

  def _told(self, batch: Batch, rng: Array) -> Batch:
    """The batch with some captions emptied."""
    if not self.config.model.drop_text:
      return batch
    draw = lambda key: jax.random.uniform(key) >= self.config.model.drop_text
    kept = rng_lib.per_example(draw, rng, 'drop_text', batch.example)
    length = jnp.where(kept, batch.inputs['text_length'], 0)
    return dataclasses.replace(batch, inputs={**batch.inputs, 'text_length': length})

  def _noisy(self, batch: Batch, latents: Array, rng: Array) -> tuple[tuple[Array, Array], Array]:
    """Noisy latents [B, h, w, C] with the network's clock [B], and the target to predict."""
    c = self.config.model
    given = (c.flow, rng, batch.example, c.image_tokens + 1)
    noisy, time, target = flow_matching.noised(latents, *given)
    # The network's clock is Show-o2's: data at 1.
    return (noisy, 1.0 - time), target

  def _next_token(self, params: Params, hidden: Array, region: Region) -> tuple[Array, Array]:
    """The summed cross-entropy of the plan, and how often its argmax is right."""
    first = self.layout.place('bot')[0]
    last = self.layout.place('codes')[1]
    return next_token.cross_entropy(
      hidden[:, first:last],
      self.model.table(params),
      region.targets[:, first:last],
      region.weights[:, first:last],
      self.config.model.logits_chunk,
    )


def _check_stages(config: Config, known: tuple[str, ...]) -> None:
  """Refuses stages that the architecture hasn't, or that can't follow one another.

  Raises:
    UserError: says what is known, and where the stage that was asked for is.
  """
  arch = config.model.arch
  for name in config.stages:
    if name == 'plan' and not config.model.vpe:
      raise UserError(
        "stage 'plan' learns to write visual prompts, and model.vpe=False leaves them out: set "
        'config.stages=joint (configs name it for you: vpe=false)'
      )
    if name in (*Internal.stages, *External.stages) and name not in known:
      raise UserError(
        f"model.arch={arch} has no stage '{name}': its stages are {', '.join(known)} (configs name "
        f'them for you: configs/t2i.py:{config.preset},arch={arch})'
      )
    if name not in known:
      raise UserError(f"no stage '{name}' in this system{nearest(name, known)}")
  order = [known.index(name) for name in config.stages]
  if order != sorted(set(order)):
    raise UserError(
      f'config.stages is {config.stages}: each stage goes on from the one before, in the order '
      f'{", ".join(known)}'
    )
  if config.stages[0] == 'render' and not config.has_parent('ar/', 'embed/'):
    raise UserError(
      "stage 'render' freezes the token expert (ar, embed), and nothing has trained it: name a run "
      'that has, with --config.start=RUN, or run stage plan first'
    )
