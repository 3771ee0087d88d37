"""Image editing with visual prompts: stage 3 of Internal+VPE and External+VPE (arXiv 2606.04457).

A run of `t2i` goes on (`config.start`) with the picture before among its tokens, embedded by a dual
path of its own. `model.arch=internal` trains everything, on flow matching and on cross-entropy at a
constant weight; the picture sees the one before, instruction and plan. `model.arch=external` trains
the token expert on cross-entropy alone: the frozen picture expert sees nothing but what that one
makes of the plan, so what an edit should keep has to go through it. Its flow loss is evaluated, and
never trained on.

Conditions are dropped as in App. D, one draw an example: the instruction (with internal the plan
too, as it would tell), the picture before, or with internal both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import Config, SampleConfig, check
from vpe_jax.contracts import (
  PARENT,
  Array,
  Batch,
  BatchSpec,
  Edits,
  Initialization,
  Params,
  PlansVisually,
  PretrainedWeights,
  Region,
  Samples,
  Stage,
  UserError,
  concatenate,
)
from vpe_jax.models import mot, unified
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sampling.settings import check_scales
from vpe_jax.sequence.spans import Layout
from vpe_jax.systems.vpe import layouts, text_to_image, unified_sampler
from vpe_jax.systems.vpe.external import External
from vpe_jax.systems.vpe.internal import Internal
from vpe_jax.systems.vpe.networks import editing
from vpe_jax.systems.vpe.networks.editing import Editor
from vpe_jax.systems.vpe.sequences import Rows

INTERNAL = Stage('edit', ('.*',), {'next_token': 1.0, 'flow': 1.0}, ema=True)
EXTERNAL = dataclasses.replace(
  INTERNAL, trainable=('ar/', 'embed/'), losses={'next_token': 1.0}, monitored=('flow',)
)


@dataclasses.dataclass(frozen=True)
class ModelConfig(text_to_image.ModelConfig):
  """Those of `t2i`, with a picture before, and conditions dropped in one draw an example.

  Attributes:
    drop: share of examples without any condition; 0 with `arch=external`, which has no such row.
    drop_text: share without instruction; with `arch=internal` they lack the plan too.
    drop_reference: share without the picture before.
    eoi: id of the text row that ends the picture before.
  """

  references: bool = True
  drop: float = 0.05
  drop_text: float = 0.05
  drop_reference: float = 0.05
  eoi: int = 0
  vp_schedule: str = 'constant'
  ce_start: float = 0.1

  def __post_init__(self) -> None:
    super().__post_init__()
    check(self, 'model.', 'references', self.references, 'true in this system')
    check(self, 'model.', 'vpe', self.vpe, 'true in this system')
    known = ('internal', 'external')
    check(self, 'model.', 'arch', self.arch in known, f'one of {", ".join(known)} in this system')
    known = 0 <= self.eoi < self.text_vocab
    check(self, 'model.', 'eoi', known, f'below text_vocab={self.text_vocab}')
    share = 0 <= self.drop_reference <= 1
    check(self, 'model.', 'drop_reference', share, 'between 0 and 1')
    together = self.drop + self.drop_text + self.drop_reference
    words = 'at most 1 together with drop_text and drop_reference'
    check(self, 'model.', 'drop', together <= 1, words)
    none = self.arch == 'internal' or not self.drop
    check(self, 'model.', 'drop', none, '0 with arch=external, whose token rows keep a condition')


@dataclasses.dataclass(frozen=True)
class Sampling(text_to_image.Sampling):
  """Those of `t2i`, with a second guidance scale.

  Attributes:
    guidance: guidance scale of the instruction; 1 is off.
    image_guidance: guidance scale of the source image; 1 is off.
  """

  image_guidance: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check_scales(self, 'image_guidance')


class Edited(Rows):
  """Rows whose tokens have a picture before among them."""

  @functools.cached_property
  def editor(self) -> Editor:
    """The network, which knows where."""
    first, last = map(self.layout.place, ('source_time', 'source_latents'))
    return Editor(self.model, (first[0], last[1]))

  def token_stream(self, params: Params, region: Region, reference: Array) -> mot.Stream:
    """See Rows."""
    return self.editor.token_stream(params, region, reference)[0]

  def head_streams(self, params: Params, stream: mot.Stream) -> dict[str, mot.Stream]:
    """See Rows."""
    condition, _ = self.editor.clean(params, stream.x.shape[0])
    return self.editor.head_streams(stream, condition)


class EditInternal(Edited, Internal):
  """The row of Internal+VPE's edits; see systems/vpe/internal.py."""

  stages = {INTERNAL.name: INTERNAL}

  @functools.cached_property
  def layout(self) -> Layout:
    """The sequence, AR expert first."""
    lengths = (self.text, self.codes, self.model.config.image_tokens)
    return layouts.edit(self.vocabulary, *lengths)

  def both(
    self,
    params: Params,
    regions: dict[str, Region],
    noisy: tuple[Array, Array],
    reference: Array,
  ) -> tuple[Array, Array]:
    """See Rows.forward."""
    return self.editor(params, regions, reference, *noisy)

  def draw(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Array]:
    """Codes [B, P] and latents [B, h, w, C] of a batch of requests, by the two scales' branches."""
    codes, conditional = unified_sampler.plan(self, settings, params, request, rng)

    def prefix(dropped: frozenset[str]) -> Prefix:
      if not dropped:
        return conditional
      if dropped == unified_sampler.ALL:
        return unified_sampler.null_prefix(self, params, request)
      return reference_prefix(self, params, request, conditional)

    scales = settings.guidance, settings.image_guidance
    guidance = Guidance.edit(*scales, layouts.PROMPT, layouts.SOURCE)
    noise = unified_sampler.noise(self.model, request, rng)
    return codes, unified_sampler.render(self, settings, params, noise, guidance, prefix)

  def train_flops(self, stage: Stage, predicted: int) -> float:
    """Matrix FLOPs of one example, all of which trains."""
    reference = unified.with_backward(editing.reference_flops(self.model.config))
    return super().train_flops(stage, predicted) + reference

  def attention_flops(self, stage: Stage) -> tuple[float, float]:
    """Of one forward pass, what attention amounts to: where all is frozen, and elsewhere."""
    frozen, trained = super().attention_flops(stage)
    return frozen, trained + editing.reference_attention_flops(self.model.config, head=True)


class EditExternal(Edited, External):
  """The rows of External+VPE's edits; see systems/vpe/external.py."""

  stages = {EXTERNAL.name: EXTERNAL}

  @functools.cached_property
  def layout(self) -> Layout:
    """The AR expert's sequence."""
    lengths = (self.text, self.codes, self.model.config.image_tokens)
    return layouts.edit_ar_sequence(self.vocabulary, *lengths)

  def regions(
    self, batch: Batch, codes: Array, keep: Array | Mapping[str, Array]
  ) -> dict[str, Region]:
    """`ar`, `prefix` and `dit` of a batch, the first without what `keep` drops."""
    return self.build(batch, codes, keep) | self._picture(codes, jnp.ones(codes.shape[:1], bool))

  def draw(
    self, params: Params, request: Batch, rng: Array, settings: Sampling
  ) -> tuple[Array, Array]:
    """Codes [B, P] and latents [B, h, w, C] of a batch of requests.

    Raises:
      UserError: guidance by the source image, which this image expert doesn't see.
    """
    if settings.image_guidance != 1.0:
      raise UserError(
        f'sample.image_guidance is {settings.image_guidance:g}, but with model.arch=external the '
        'image expert sees no source image: set it to 1'
      )
    return super().draw(params, request, rng, settings)

  def train_flops(self, stage: Stage, predicted: int) -> float:
    """Matrix FLOPs of one example; the time embedding is frozen, and the head doesn't run."""
    blocks = editing.reference_flops(self.model.config)
    del blocks['modulation']
    frozen = blocks.pop('clock') + blocks.pop('time')
    trained = unified.with_backward(blocks)
    return super().train_flops(stage, predicted) + trained + frozen

  def attention_flops(self, stage: Stage) -> tuple[float, float]:
    """Of one forward pass, what attention amounts to: where all is frozen, and elsewhere."""
    frozen, trained = super().attention_flops(stage)
    return frozen, trained + editing.reference_attention_flops(self.model.config, head=False)


def reference_prefix(rows: Edited, params: Params, request: Batch, whole: Prefix) -> Prefix:
  """The prefix `[bos] [boi] time x_ref [eoi] [boi]` of the branch without instruction and plan.

  All but its last token are the first of `whole`, where they see and are seen by the same: their
  keys and values are taken from there, and [boi] alone is computed, at the place after them.
  """
  codes = jnp.zeros((request.example.shape[0], rows.codes), jnp.int32)
  regions = unified_sampler.build(rows, request, codes, frozenset({layouts.PROMPT}))
  row, at, boi = regions['ar'], rows.layout.place('eoi')[1], rows.slot('boi')
  cut = lambda leaf, start, stop: jax.tree.map(lambda x: x[:, start:stop], leaf)
  last = cut(row, boi, boi + 1)
  rest = jax.tree.map(jnp.zeros_like, cut(row.visibility, at + 1, None))
  seen = cut(row.visibility, 0, at)
  key = concatenate([seen, last.visibility, rest, regions['dit'].visibility])
  caches = whole.cache.body, whole.cache.head
  body, head = (mot.Cache(cache.k, cache.v, key) for cache in caches)
  hidden, body = unified_sampler.tokens(rows.model, params, last, body, at)
  stream = mot.Stream(hidden, last.positions, last.visibility)
  _, head = rows.model.head(params, {'ar': stream}, head, at)
  return Prefix(unified_sampler.Caches(body, head), regions['dit'])


class System(text_to_image.System):
  """See vpe_jax.contracts.System; what it doesn't say is as in text to image."""

  def __init__(self, config: Config) -> None:
    if config.stages != (INTERNAL.name,):
      raise UserError(f"config.stages is {config.stages}: this system has one stage, 'edit'")
    if not config.data.source_images:
      raise UserError(
        'this system trains on pictures before and after an edit: set data.source_images=True, and '
        'data.source to edits or to a folder'
      )
    if not config.has_parent('ar/', 'dit/', 'embed/'):
      raise UserError(
        "stage 'edit' goes on from a run that draws: name one of configs/t2i.py of the same sizes, "
        'with --config.start=RUN'
      )
    super().__init__(config)
    # Text towers compare images with captions, and an instruction is none.
    self.capabilities = (Samples, PlansVisually, Edits)
    self.plan_rankers = ('likelihood',)

  def _rows(self) -> EditInternal | EditExternal:
    c = self.config.model
    self.vocabulary = dataclasses.replace(self.vocabulary, eoi=c.eoi)
    given = (self.model, self.vocabulary, self.config.data.text_length, c.plan_tokens, c.flow)
    return EditExternal(*given) if c.arch == 'external' else EditInternal(*given)

  @property
  def initialization(self) -> Initialization:
    """The second dual path: Show-o2's where `model.init_from` names one, else the parent run's.

    All else comes from the parent run. External's image expert is frozen here: nothing would train
    random parameters in it.
    """
    paths = (('dit/dual_path/', 'ar/dual_path/'),)
    grown = (PretrainedWeights(PARENT, self.config.start, None, paths),)
    if self.config.model.init_from:
      (published,) = self._published()
      grown = (dataclasses.replace(published, paths=paths),)
    return Initialization(grown=grown)

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """As in text to image, with source images beside the images."""
    spec = super().batch_spec(batch_size)
    image = spec.encoder_inputs['image']
    return dataclasses.replace(spec, encoder_inputs={'image': image, 'source_image': image})

  def request_spec(self, batch_size: int) -> Batch:
    """Instructions, and latents of the source images."""
    source = {'source_latents': self.encoded_shapes(batch_size)['source_latents']}
    return dataclasses.replace(super().request_spec(batch_size), encoded=source)

  def encoded_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """As in text to image, and latents of the source image."""
    shapes = super().encoded_shapes(batch_size)
    return shapes | {'source_latents': shapes['latents']}

  def encode(self, frozen: Params, inputs: Mapping[str, Array], rng: Array) -> dict[str, Array]:
    """Visual prompts and latents of images, and latents of source images."""
    source = self.encode_source(frozen, inputs['source_image'])
    return super().encode(frozen, inputs, rng) | source

  def encode_source(self, frozen: Params, images: Array) -> dict[str, Array]:
    """Latents [B, h, w, C] of source images [B, R, R, 3] uint8."""
    return {'source_latents': self.image.encode(frozen, images)}

  def encoder_flops(self, stage: Stage) -> float:
    """Matrix FLOPs of the frozen encoders for one example, where they run online."""
    return super().encoder_flops(stage) + self._online_flops(self.encode_source)

  def _keep(self, batch: Batch, rng: Array, stage: Stage) -> dict[str, Array]:
    """Of each condition, which examples keep it: one draw decides on both."""
    c = self.config.model
    drawn = rng_lib.per_example(jax.random.uniform, rng, 'drop', batch.example)
    text, reference = c.drop_text, c.drop_text + c.drop_reference
    nothing = (reference <= drawn) & (drawn < reference + c.drop)
    told = (drawn >= text) & ~nothing
    return {
      layouts.PROMPT: told,
      layouts.SOURCE: ((drawn < text) | (drawn >= reference)) & ~nothing,
    }

  def _told(self, batch: Batch, rng: Array) -> Batch:
    return batch
