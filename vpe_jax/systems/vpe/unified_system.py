"""The system of a unified model: losses, sampling and visual prompts of t2i and edit.

text_to_image.py and editing.py choose the parts of the system: among others its stages, the experts
(internal.py, external.py), the conditions that training drops (dropping.py), and the guidance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from vpe_jax.codecs import pixels
from vpe_jax.config import Config, SampleConfig
from vpe_jax.contracts import (
  Array,
  Batch,
  BatchSpec,
  Edits,
  Generated,
  Initialization,
  LossTerm,
  Params,
  Region,
  ScoresImages,
  Stage,
)
from vpe_jax.models import unified
from vpe_jax.models.siglip import unit
from vpe_jax.models.unified import Unified
from vpe_jax.objectives import flow_matching, next_token
from vpe_jax.sampling import autoregressive
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.systems.vpe.dropping import Dropping
from vpe_jax.systems.vpe.external import External
from vpe_jax.systems.vpe.image_system import ImageSystem
from vpe_jax.systems.vpe.internal import Internal


@dataclasses.dataclass(frozen=True)
class Parts:
  """The choices that make a unified system.

  Attributes:
    stages: the stages of the config, in order.
    experts: the network's two experts and their sequences.
    dropping: conditions that training drops.
    guidance: maps sampling settings to the guidance of the image.
    capabilities: see contracts.System.
    plan_rankers: see contracts.PlansVisually.
    initialization: see contracts.System.
    frozen_ids: rows of the text embedding table that don't train.
  """

  stages: tuple[Stage, ...]
  experts: Internal | External
  dropping: Dropping
  guidance: Callable[[SampleConfig], Guidance]
  capabilities: tuple[type, ...]
  plan_rankers: tuple[str, ...]
  initialization: Initialization
  frozen_ids: tuple[int, ...] = ()


class UnifiedSystem(ImageSystem, Edits, ScoresImages):
  """The systems `t2i` and `edit`; see vpe_jax.contracts.System.

  Attributes:
    experts: see Parts.
    dropping: see Parts.
    guidance: see Parts.
    frozen_ids: see Parts.
    model: the network.
    layout: the AR expert's sequence.
  """

  logical_axes = unified.LOGICAL_AXES

  def __init__(self, config: Config, parts: Parts) -> None:
    c = config.model
    table = ('model.text_vocab', c.text_vocab)
    super().__init__(config, parts.stages, parts.capabilities, c.image.codec(), table)
    self.check_image_size()
    names = ('bos', 'boi', 'eoi') if c.references else ('bos', 'boi')
    self.special_ids = {f'model.{name}': getattr(c, name) for name in names}
    self.plan_rankers, self.initialization = parts.plan_rankers, parts.initialization
    self.experts, self.dropping, self.guidance = parts.experts, parts.dropping, parts.guidance
    self.frozen_ids = parts.frozen_ids
    self.model: Unified = parts.experts.ar.model
    self.layout = parts.experts.ar.layout

  @property
  def has_source(self) -> bool:
    """Whether batches have source images."""
    return self.model.config.references

  def inherit(self, params: Params, frozen: Params, rng: Array) -> Params:
    """Initializes text and code embeddings from the frozen codecs, if the system asks for it.

    See `initialization.from_frozen`: `model.inherit` is set, and the data are not synthetic.
    """
    if not self.initialization.from_frozen:
      return params
    c, keys = self.config.model, jax.random.split(rng)
    embeddings = lambda table, key: _rotated(table, key, c.ar.width, c.inherit)
    text = embeddings(frozen['siglip']['text']['token'], keys[0])
    codes = embeddings(unit(frozen['feature_vq']['codebook']), keys[1])
    embed = params['embed']
    embed = embed | {'text': text, 'codes': embed['codes'].at[: self.codes].set(codes)}
    return params | {'embed': embed}

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """Prompts and images, with source images where the system edits."""
    spec = super().batch_spec(batch_size)
    if not self.has_source:
      return spec
    images = dict(spec.encoder_inputs)
    images['source_image'] = images['image']
    return dataclasses.replace(spec, encoder_inputs=images)

  def request_spec(self, batch_size: int) -> Batch:
    """Prompts, with latents of source images where the system edits."""
    request = super().request_spec(batch_size)
    if not self.has_source:
      return request
    source = {'source_latents': self.encoded_shapes(batch_size)['source_latents']}
    return dataclasses.replace(request, encoded=source)

  def encoded_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Visual prompts [B, P] where there are any, latents of images and of source images."""
    shapes = super().encoded_shapes(batch_size)
    return shapes | ({'source_latents': shapes['latents']} if self.has_source else {})

  def encode(self, frozen: Params, inputs: Mapping[str, Array], keys: Array) -> dict[str, Array]:
    """Visual prompts, latents of images, and latents of source images."""
    encoded = super().encode(frozen, inputs, keys)
    return encoded | (self.encode_source(frozen, inputs['source_image']) if self.has_source else {})

  def encode_source(self, frozen: Params, images: Array) -> dict[str, Array]:
    """Latents [B, h, w, C] of source images [B, R, R, 3] uint8."""
    return {'source_latents': self.image.encode(frozen, images)}

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """Predicted tokens and latent elements of the batch."""
    del step
    c = self.config.model
    B = batch.example.shape[0]
    codes = jnp.zeros((B, c.visual_prompt_tokens), jnp.int32)
    regions = self.experts.regions(batch, codes, self.dropping.keep(batch, rng, stage))
    counts = {}
    if 'next_token' in stage.losses:
      counts['next_token'] = counts['accuracy'] = jnp.sum(regions['ar'].weights)
    if 'flow' in stage.losses:
      counts['flow'] = jnp.float32(B * c.latent_size**2 * c.latent_channels)
    return {name: counts[name] for name in sorted(counts)}

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """The stage's losses: `next_token` (nats), and `flow`; `accuracy` (argmax) is only logged."""
    if self.config.unroll:
      params = self.model.prepare(params)
    params = self._with_frozen_embeddings(params)
    batch = dataclasses.replace(batch, encoded=self.encoded(frozen, batch, rng))
    keep = self.dropping.keep(batch, rng, stage)
    regions = self.experts.regions(self.dropping.captions(batch, rng), self._codes(batch), keep)
    counts = self.counts(batch, rng, step, stage)
    terms, source = {}, batch.encoded.get('source_latents')
    if 'flow' in stage.losses:
      c = self.config.model
      # Show-o2's time shift counts the time token, too: + 1.
      noisy, time, target = flow_matching.noised(
        batch.encoded['latents'], c.flow, rng, batch.example, c.image_tokens + 1
      )
      # Show-o2's conventions: time is 1 at the data, and the velocity is data minus noise.
      hidden, velocity = self.experts.forward(params, regions, (noisy, 1.0 - time), source)
      error = flow_matching.loss(c.flow, -velocity, target, time)
      terms['flow'] = LossTerm(error, counts['flow'], stage.weight('flow', step))
    else:
      hidden = self.experts.ar.hidden(params, regions['ar'], source)
    if 'next_token' in stage.losses:
      loss, hits = self._next_token(params, hidden, regions['ar'])
      weight = stage.weight('next_token', step)
      terms['next_token'] = LossTerm(loss, counts['next_token'], weight)
      terms['accuracy'] = LossTerm(hits, counts['accuracy'], 0.0)
    return {name: terms[name] for name in sorted(terms)}

  def generate(
    self, params: Params, frozen: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> Generated:
    """Samples the visual prompt, then renders the image; see contracts.Samples."""
    codes, latents = self.sample(params, request, rng, settings)
    encoded = {'visual_prompt': codes} if self.codes else {}
    image = self.image.decode(frozen, latents, rng)
    return Generated(image, encoded | {'latents': latents})

  def sample(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Array]:
    """Samples codes [B, P] and latents [B, h, w, C] of requests."""
    return self.experts.sample(params, request, rng, settings, self.guidance(settings))

  def draft(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> dict[str, Array]:
    """Visual prompts [B, P]; the diffusion expert isn't run."""
    if not self.codes:
      return {}
    return {'visual_prompt': self.experts.ar.decode(params, request, rng, settings)[0]}

  def plan_likelihood(self, params: Params, request: Batch) -> Array:
    """Mean log-probability of the visual prompts given the prompts: [B], nats."""
    ar, codes = self.experts.ar, request.encoded['visual_prompt']
    region = ar.request_regions(request, codes)['ar']
    hidden = ar.hidden(params, region, request.encoded.get('source_latents'))
    first, last = ar.slot('bot'), self.layout.place('codes')[1]
    # The slot before each code predicts it.
    logits = self.model.code_logits(params, hidden[:, first : last - 1])
    return autoregressive.log_likelihood(logits, codes)

  def plan_similarity(self, frozen: Params, request: Batch) -> Array:
    """Cosine similarities [B] of each visual prompt and its caption, embedded by SigLIP."""
    visual_prompt = self.visual_prompt.embed_codes(frozen, request.encoded['visual_prompt'])
    text = (request.inputs['text'], request.inputs['text_length'])
    return jnp.einsum('BD,BD->B', visual_prompt, self.visual_prompt.embed_text(frozen, *text))

  def similarity(self, frozen: Params, images: Array, inputs: Mapping[str, Array]) -> Array:
    """Cosine similarities [B, B] of images [B, R, R, 3] in [0, 1] (axis 0) x captions (axis 1)."""
    siglip = self.visual_prompt.siglip
    side = self.config.model.visual_prompt.siglip.image_size
    variables = {'params': frozen['siglip']}
    pixel_values = pixels.to_signed(pixels.view(images, side))
    image = siglip.apply(variables, pixel_values, method='embed_images')
    caption = self.visual_prompt.embed_text(frozen, inputs['text'], inputs['text_length'])
    return jnp.einsum('BD,VD->BV', image, caption)

  def tokens(self, stage: Stage) -> int:
    """Tokens of both experts, or of the AR expert alone in stage `plan`."""
    return self.experts.tokens(stage)

  def _codes(self, batch: Batch) -> Array:
    """Visual prompts [B, P] of a batch; P = 0 where the model has none."""
    none = jnp.zeros((batch.example.shape[0], 0), jnp.int32)
    return batch.encoded.get('visual_prompt', none)

  def _with_frozen_embeddings(self, params: Params) -> Params:
    """The parameters, with no gradient for the embeddings of `frozen_ids`."""
    if not self.frozen_ids:
      return params
    ids, text = jnp.array(self.frozen_ids), params['embed']['text']
    text = text.at[ids].set(jax.lax.stop_gradient(text[ids]))
    return params | {'embed': params['embed'] | {'text': text}}

  def _next_token(self, params: Params, hidden: Array, region: Region) -> tuple[Array, Array]:
    """Summed cross-entropy of visual prompt and [eot], and number of correct argmax predictions."""
    first, last = self.layout.place('bot')[0], self.layout.place('codes')[1]
    return next_token.cross_entropy(
      hidden[:, first:last],
      self.model.table(params),
      region.targets[:, first:last],
      region.weights[:, first:last],
      self.config.model.logits_chunk,
    )


def _rotated(table: Array, key: Array, width: int, scale: float) -> Array:
  """Centres a table [V, W], rotates it to width D, and scales it to standard deviation `scale`.

  All distances keep their ratios; if D < W, only approximately, because D of the rotated dimensions
  are kept.
  """
  W = table.shape[1]
  rotation = jax.random.orthogonal(key, max(width, W))[:W, :width]
  table = table.astype(jnp.float32)
  table = jnp.einsum('VW,WD->VD', table - jnp.mean(table, 0), rotation)
  return scale * table / jnp.std(table)
