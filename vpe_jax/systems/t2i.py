"""Text to image with visual prompts, trained end to end: Internal+VPE (arXiv 2606.04457).

The model writes a plan of the picture in discrete SigLIP tokens by next-token prediction, then
renders it by flow matching. Two stages: `plan` trains the token expert on cross-entropy alone
while the picture expert is frozen and not run; `joint` trains both experts, flow matching at
weight 1 and cross-entropy at the progressive weight of Eq. 3. Text and plan are dropped together
for guidance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.codecs import choice, pixels
from vpe_jax.config import Config, SampleConfig, check, nearest
from vpe_jax.contracts import (
  Array,
  Drawing,
  Examples,
  LossTerm,
  Params,
  Stage,
  Start,
  UserError,
)
from vpe_jax.data import sequence
from vpe_jax.models import unified
from vpe_jax.models.siglip import unit
from vpe_jax.objectives import flow_matching, next_token, schedules
from vpe_jax.ops.flops import matrix_flops
from vpe_jax.systems import rendering

STAGES = {
  'plan': Stage('plan', ('ar/', 'embed/'), ('next_token',), ema=False, source='fresh', draws=False),
  'joint': Stage('joint', ('.*',), ('next_token', 'flow'), ema=True, source='the stage before'),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig(unified.UnifiedConfig, choice.CodecsConfig):
  """The network's sizes, the frozen codecs, and how the two losses meet.

  Attributes:
    drop: share of examples whose text and plan are dropped together, in stage `joint`.
    drop_text: share of examples whose text alone is dropped, in both stages: what the guidance of
      the plan compares with (`sample.plan_guidance`; the paper uses none).
    inherit: standard deviation of text and code rows that start as SigLIP's rows of the same words
      and as the rows of the codebook: what means something alike starts out alike (0: rows are
      drawn at random, as in the paper, whose text rows come from Show-o2). Synthetic codes mean
      nothing: their rows are drawn.
    init_from: a Show-o2 whose language model both experts start from, and the picture expert's
      embedding and head too: a folder in the released layout, an import, or a hub id (empty: all is
      drawn at random). Rows of codes are drawn, as Show-o2 has none.
    ce_start: weight of the cross-entropy at the start of stage `joint` (Eq. 3, lambda_0).
    ce_end: its weight at the end (lambda_1).
    time_shift: shift of the training times towards noise (0: Show-o2's for this many tokens).
    logits_chunk: predicted tokens whose logits exist at a time (0: all).
  """

  drop: float = 0.1
  drop_text: float = 0.0
  inherit: float = 0.0
  init_from: str = ''
  ce_start: float = 0.03
  ce_end: float = 0.1
  time_shift: float = 0.0
  logits_chunk: int = 0

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ('drop', 'drop_text'):
      check(self, 'model.', name, 0 <= getattr(self, name) <= 1, 'between 0 and 1')
    for name in ('bos', 'boi'):
      known = getattr(self, name) < self.text_vocab
      check(self, 'model.', name, known, f'below text_vocab={self.text_vocab}')
    pairs = {
      'codes': (self.codes, self.plan_codes),
      'latent_channels': (self.latent_channels, self.image_channels),
    }
    for name, (ours, codec) in pairs.items():
      if ours != codec:
        raise UserError(f'model.{name} is {ours}, but its frozen codec has {codec}: set them equal')
    if self.inherit and self.siglip_vq is not None:
      raise UserError(
        'model.inherit takes rows from the embedded codecs, and model.siglip_vq takes their place: '
        'set model.inherit=0'
      )
    if self.inherit and self.text_vocab != self.visual_prompt.siglip.vocabulary:
      raise UserError(
        f'model.inherit takes text rows from a SigLIP of {self.visual_prompt.siglip.vocabulary} '
        f'words, but model.text_vocab is {self.text_vocab}: set them equal, or model.inherit=0'
      )


class System:
  """See vpe_jax.contracts.System."""

  draws_with = ('image',)

  def __init__(self, config: Config) -> None:
    for name in config.stages:
      if name not in STAGES:
        raise UserError(f"no stage '{name}' in this system{nearest(name, STAGES)}")
    order = [list(STAGES).index(name) for name in config.stages]
    if order != sorted(set(order)):
      raise UserError(
        f'config.stages is {config.stages}: each stage goes on from the one before, in the order '
        f'{", ".join(STAGES)}'
      )
    c: ModelConfig = config.model
    self.config = config
    origin = 'fresh, embed/ from the codecs' if self._inherits else 'fresh'
    if c.init_from:
      origin = f'{c.init_from}, but embed/codes fresh'
    first, *others = (STAGES[name] for name in config.stages)
    self.stages = (dataclasses.replace(first, source=origin), *others)
    self.codes = c.codes
    self.logical_axes = unified.LOGICAL_AXES
    self.model = unified.Unified(c, jnp.dtype(config.dtype), config.remat, config.attention)
    self.visual_prompt = choice.plan_codec(c, jnp.dtype(config.dtype))
    self.image = choice.image_codec(c)
    # Published tokenizers come without a text tower to compare with.
    self.similarity = self._similarity if c.siglip_vq is None else None
    self.vocabulary = sequence.Vocabulary(c.text_vocab, c.codes, c.bos, c.boi)
    self.spans = sequence.text_to_image(config.data.text_length, c.plan_tokens, c.image_tokens)

  @property
  def frozen_weights(self) -> Mapping[str, str]:
    """No codec is needed where codes and latents are synthetic."""
    if self.config.data.source == 'synthetic':
      return {}
    return self.config.model.frozen_weights

  @property
  def published(self) -> Mapping[str, Start]:
    """Those of the frozen networks that are published."""
    return self.config.model.published

  def init(self, rng: Array) -> Params:
    """Fresh parameters, float32."""
    return self.model.init(rng)

  @property
  def starts(self) -> tuple[Start, ...]:
    """Show-o2, where `model.init_from` names one: its language model goes to both experts."""
    c = self.config.model
    if not c.init_from:
      return ()
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(unified.UnifiedConfig)}
    fields |= {'arch': 'single', 'dit': c.ar, 'codes': 0}
    copies = (('ar/', 'dit/'),) if c.arch == 'internal' else ()
    paths = (('embed/text', 'embed/text'), ('ar/', 'ar/'), *copies, ('dit/', 'dit/'))
    return (Start('showo2', c.init_from, unified.UnifiedConfig(**fields), paths),)

  def inherit(self, params: Params, frozen: Params, rng: Array) -> Params:
    """Text and code rows from the frozen networks, where `model.inherit` asks for it."""
    if not self._inherits:
      return params
    embed, keys = params['embed'], jax.random.split(rng)
    text = self._turned(frozen['siglip']['text']['token'], keys[0])
    codes = self._turned(unit(frozen['visual_prompt']['codebook']), keys[1])
    embed = embed | {'text': text, 'codes': embed['codes'].at[: self.codes].set(codes)}
    return params | {'embed': embed}

  @property
  def _inherits(self) -> bool:
    return bool(self.config.model.inherit and self.frozen_weights)

  def _turned(self, rows: Array, key: Array) -> Array:
    """Rows [V, W] without their mean, at the model's width: distances stay in proportion."""
    width = self.config.model.ar.width
    turn = jax.random.orthogonal(key, max(width, rows.shape[1]))[: rows.shape[1], :width]
    rows = rows.astype(jnp.float32)
    rows = jnp.einsum('VW,WD->VD', rows - jnp.mean(rows, 0), turn)
    return self.config.model.inherit * rows / jnp.std(rows)

  def prepare(self, params: Params) -> Params:
    """Parameters in the layout that decoding is fast in; outside jit, once."""
    return self.model.prepare(params)

  def abstract_batch(self, batch_size: int) -> Examples:
    """Images where encoders run online, else codes and latents."""
    data = self.config.data
    leaf = lambda shape, dtype: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    common = {
      'example': leaf((), jnp.int32),
      'text': leaf((data.text_length,), jnp.int32),
      'text_length': leaf((), jnp.int32),
    }
    if data.encode == 'online':
      return Examples(**common, image=leaf((data.image_size, data.image_size, 3), jnp.uint8))
    codes, latents = self.abstract_encoded(batch_size)
    return Examples(**common, codes=codes, latents=latents)

  def abstract_encoded(self, batch_size: int) -> tuple[Any, Any]:
    """The codes [B, P] and latents [B, h, w, C] that the model takes: what `encode` must make."""
    c = self.config.model
    grid = (c.latent_size, c.latent_size, c.latent_channels)
    codes = jax.ShapeDtypeStruct((batch_size, c.plan_tokens), jnp.int32)
    return codes, jax.ShapeDtypeStruct((batch_size, *grid), jnp.float32)

  def encode(self, frozen: Params, images: Array) -> tuple[Array, Array]:
    """Codes [B, P] int32 and latents [B, h, w, C] of images [B, R, R, 3] uint8."""
    return self.visual_prompt.encode(frozen, images), self.image.encode(frozen, images)

  def abstract_frozen(self) -> Params:
    """Both codecs' networks as shapes; none where codes and latents are synthetic."""
    if not self.frozen_weights:
      return {}
    return {**self.visual_prompt.abstract_params(), **self.image.abstract_params()}

  def decode(self, frozen: Params, latents: Array) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of latents [B, h, w, C]."""
    return self.image.decode(frozen, latents)

  def counts(self, batch: Examples, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """Predicted tokens, and latent elements, of the batch."""
    c = self.config.model
    dummy = jnp.zeros((batch.text.shape[0], c.plan_tokens), jnp.int32)
    regions = self._regions(batch, dummy, self._keep(batch, rng, stage))
    tokens = jnp.sum(regions['ar'].weights)
    counts = {'next_token': tokens, 'accuracy': tokens}
    if 'flow' in stage.losses:
      elements = batch.text.shape[0] * c.latent_size**2 * c.latent_channels
      counts['flow'] = jnp.float32(elements)
    return {name: counts[name] for name in sorted(counts)}

  def losses(
    self, params: Params, frozen: Params, batch: Examples, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """`next_token` (nats), `accuracy` of its argmax (logged), and `flow` where the stage has it."""
    if self.config.unroll:
      params = self.model.prepare(params)
    codes, latents = batch.codes, batch.latents
    if codes is None:
      codes, latents = self.encode(frozen, batch.image)
    regions = self._regions(self._told(batch, rng), codes, self._keep(batch, rng, stage))
    counts = self.counts(batch, rng, step, stage)
    terms = {}
    if 'flow' in stage.losses:
      hidden, error = self._flow(params, regions, batch, latents, rng)
      weight = 1.0 if stage.name == 'joint' else 0.0
      terms['flow'] = LossTerm(error, counts['flow'], weight)
    else:
      streams = {'ar': self.model.token_stream(params, regions['ar'])}
      hidden = self.model.backbone(params, streams)[0]['ar']
    first = sequence.place(self.spans, 'bot')[0]
    last = sequence.place(self.spans, 'codes')[1]
    region = regions['ar']
    loss, hits = next_token.cross_entropy(
      hidden[:, first:last],
      self.model.table(params),
      region.targets[:, first:last],
      region.weights[:, first:last],
      self.config.model.logits_chunk,
    )
    terms['next_token'] = LossTerm(loss, counts['next_token'], self._token_weight(step, stage))
    terms['accuracy'] = LossTerm(hits, counts['accuracy'], 0.0)
    return {name: terms[name] for name in sorted(terms)}

  def generate(
    self, params: Params, frozen: Params, request: Examples, rng: Array, settings: SampleConfig
  ) -> Drawing:
    """Plans, then renders; see vpe_jax.contracts.System and systems/rendering.py."""
    job = rendering.Job(self.model, self.spans, self.vocabulary, settings)
    codes, latents = rendering.draw(job, params, request, rng)
    return Drawing(self.decode(frozen, latents), codes, latents)

  def _similarity(self, frozen: Params, images: Array, text: Array, text_length: Array) -> Array:
    """How well each picture [B, R, R, 3] in [0, 1] fits each caption: cosines [B, B].

    The frozen SigLIP, which made the plans, is the measure: good for following a run, not for
    scoring it (vpe_jax.evaluation has an independent judge). A caption that is longer than its
    text tower's positions counts by its beginning.
    """
    siglip = self.visual_prompt.siglip
    side = self.config.model.visual_prompt.siglip.image_size
    variables = {'params': frozen['siglip']}
    seen = pixels.to_signed(pixels.view(images, side))
    image = siglip.apply(variables, seen, method='embed_images')
    limit = self.config.model.visual_prompt.siglip.text_length
    shown = jnp.minimum(text_length, limit)
    caption = siglip.apply(variables, text[:, :limit], shown, method='embed_text')
    return jnp.einsum('BD,VD->BV', image, caption)

  def flops(self, stage: Stage) -> float:
    """Forward and backward matrix FLOPs of one example; see contracts.System.

    Both stages train whatever they run: in `plan` the frozen picture expert doesn't run at all.
    """
    predicted = self.config.model.plan_tokens + 1
    tokens, image = self._length('ar'), self._length('dit') if 'flow' in stage.losses else 0
    trained = unified.train_flops(self.config.model, tokens, image, predicted)
    return trained + self.encoder_flops(stage)

  def encoder_flops(self, stage: Stage) -> float:
    """Matrix FLOPs of the frozen encoders for one example: those that the stage needs, online."""
    data = self.config.data
    if data.encode != 'online' or not self.frozen_weights:
      return 0.0
    # Without a flow loss nothing reads the latents, and their encoder is compiled away.
    used = 2 if 'flow' in stage.losses else 1
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), jnp.uint8)
    encode = lambda frozen, images: self.encode(frozen, images)[:used]
    return matrix_flops(encode, self.abstract_frozen(), image)

  def attention_flops(self, stage: Stage) -> float:
    """Of the forward pass, what attention amounts to: see unified.attention_flops."""
    image = self._length('dit') if 'flow' in stage.losses else 0
    return unified.attention_flops(self.config.model, self._length('ar'), image)

  def tokens(self, stage: Stage) -> int:
    """Tokens of both experts, or of the token expert alone in stage `plan`."""
    return self._length('ar') + (self._length('dit') if 'flow' in stage.losses else 0)

  def _length(self, expert: str) -> int:
    return sequence.region_length(self.spans, expert, self.config.model.multiple)

  def _regions(self, batch: Examples, codes: Array, keep: Array) -> dict[str, Any]:
    return sequence.build(
      self.spans,
      self.vocabulary,
      batch.text,
      batch.text_length,
      codes,
      keep,
      self.config.model.multiple,
    )

  def _keep(self, batch: Examples, rng: Array, stage: Stage) -> Array:
    """Which examples keep text and plan: all where no flow loss would use the null branch."""
    if 'flow' not in stage.losses:
      return jnp.ones(batch.example.shape, bool)
    draw = lambda key: jax.random.uniform(key) >= self.config.model.drop
    return rng_lib.per_example(draw, rng, 'drop', batch.example)

  def _told(self, batch: Examples, rng: Array) -> Examples:
    """The batch with some captions emptied."""
    if not self.config.model.drop_text:
      return batch
    draw = lambda key: jax.random.uniform(key) >= self.config.model.drop_text
    kept = rng_lib.per_example(draw, rng, 'drop_text', batch.example)
    return dataclasses.replace(batch, text_length=jnp.where(kept, batch.text_length, 0))

  def _token_weight(self, step: Array, stage: Stage) -> Array | float:
    if stage.name == 'plan':
      return 1.0
    c = self.config.model
    total = self.config.steps[self.config.stages.index(stage.name)]
    return schedules.sigmoid_schedule(step, total, c.ce_start, c.ce_end)

  def _flow(
    self, params: Params, regions: dict[str, Any], batch: Examples, latents: Array, rng: Array
  ) -> tuple[Array, Array]:
    """Hidden states of the token expert, and the summed squared error of the velocity."""
    c = self.config.model
    shift = c.time_shift or flow_matching.token_shift(c.image_tokens + 1)
    draw = lambda key: flow_matching.sample_time(key, shift)
    time = rng_lib.per_example(draw, rng, 'time', batch.example)
    normal = lambda key: jax.random.normal(key, latents.shape[1:])
    noise = rng_lib.per_example(normal, rng, 'noise', batch.example)
    noisy = flow_matching.path(latents, noise, time)
    hidden, velocity = self.model(params, regions, noisy, 1.0 - time)
    # The network's clock and velocity are Show-o2's: data at 1, data minus noise.
    return hidden, flow_matching.squared_error(-velocity, flow_matching.target(latents, noise))
