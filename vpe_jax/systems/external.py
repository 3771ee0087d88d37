"""Tokens and picture in rows of their own: External+VPE, `arch=external` (models/external.py).

With `model.condition=cross` the picture expert has cross-attention (models/external_cross.py).

Stage `plan` trains the token expert as with `arch=internal`, and its checkpoint serves both: the
row lacks internal's [boi], which comes last there, so that no other token sees it, and predicts
nothing. Stage `render` trains the picture expert alone, on what the frozen token expert makes of
true plans.
"""

from __future__ import annotations

import jax.numpy as jnp

from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Examples, Params, Region, Stage
from vpe_jax.data import sequence
from vpe_jax.models import external, external_cross, unified
from vpe_jax.systems import rendering
from vpe_jax.systems.internal import PLAN

RENDER = Stage('render', ('dit/',), {'flow': 1.0}, ema=True)


class External:
  """Both rows, and what is done with them; methods as those of systems/internal.py.

  Attributes:
    stages: by name, in their order.
    spans: the token expert's row.
    picture_spans: the picture expert's.
  """

  stages = {stage.name: stage for stage in (PLAN, RENDER)}

  def __init__(
    self,
    model: unified.Unified,
    vocabulary: sequence.Vocabulary,
    text: int,
    codes: int,
  ) -> None:
    """`text` and `codes` are the tokens of a caption and of a plan."""
    self.model = model
    self.vocabulary = vocabulary
    self.spans = sequence.token_row(text, codes)
    self.picture_spans = sequence.picture_row(codes, model.config.image_tokens)
    self.pair = external_cross.pair(model, sequence.place(self.spans, 'codes'))

  def regions(self, batch: Examples, codes: Array, keep: Array) -> dict[str, Region]:
    """`ar`, `prefix` and `dit` of a batch; where `keep` [B] is False, the picture has no plan."""
    tokens = sequence.build(
      self.spans,
      self.vocabulary,
      batch.text,
      batch.text_length,
      codes,
      jnp.ones_like(keep),
      self.model.config.multiple,
    )
    return tokens | self._picture(codes, keep)

  def forward(
    self, params: Params, regions: dict[str, Region], noisy: tuple[Array, Array] | None
  ) -> tuple[Array, Array | None]:
    """The token expert over its row, then the other over its own."""
    if noisy is None:
      stream = self.model.token_stream(params, regions['ar'])
      return self.model.backbone(params, {'ar': stream})[0]['ar'], None
    hidden, plan = self.pair.read(params, regions['ar'])
    row = {name: regions[name] for name in ('prefix', 'dit')}
    return hidden, self.pair(params, plan, row, *noisy)

  def draw(
    self, params: Params, request: Examples, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Array]:
    """Codes [B, P] and latents [B, h, w, C] of a batch of requests."""
    job = self.job(settings)
    codes, row = rendering.decode(job, params, request, rng)
    prefix = self.prefix(params, row)
    null = lambda: self.null_prefix(params, request)
    return codes, rendering.guided(job, params, request, prefix, null, rng)

  def job(self, settings: SampleConfig) -> rendering.Job:
    """What drawing and planning keep static."""
    return rendering.Job(self.model, self.spans, self.vocabulary, settings)

  def prefix(self, params: Params, row: rendering.Decoded) -> rendering.Prefix:
    """What all flow steps share of the picture expert's row, from a decoded plan."""
    plan = self.pair.plan(row.region, row.hidden, row.body)
    B = row.region.ids.shape[0]
    regions = self.pair.placed(plan, self._row(B, keep=True))
    return rendering.Prefix(regions['dit'], *self.pair.prefill(params, plan, regions))

  def null_prefix(self, params: Params, request: Examples) -> rendering.Prefix:
    """What they share where the plan is dropped, computed on one row for the whole batch."""
    regions = self._row(1, keep=False)
    prefix = rendering.Prefix(regions['dit'], *self.pair.prefill_null(params, regions))
    return rendering.repeated(prefix, request.example.shape[0])

  def train_flops(self, stage: Stage, predicted: int) -> float:
    """Matrix FLOPs of one example; in `render` the token expert runs forward alone."""
    lengths = self._lengths()
    if 'flow' not in stage.losses:
      return unified.train_flops(self.model.config, lengths.tokens, 0, predicted)
    return external.train_flops(self.model.config, lengths)

  def attention_flops(self, stage: Stage) -> tuple[float, float]:
    """Of one forward pass, what attention amounts to: where all is frozen, and elsewhere."""
    reading, drawing = external.attention_flops(self.model.config, self._lengths())
    return (reading, drawing) if 'flow' in stage.losses else (0.0, reading)

  def tokens(self, stage: Stage) -> int:
    """Tokens of the token expert, and in `render` those that pass the picture expert's layers."""
    lengths = self._lengths()
    if 'flow' not in stage.losses:
      return lengths.tokens
    return lengths.tokens + lengths.prefix - lengths.held + lengths.image

  def _lengths(self) -> external.Lengths:
    first, last = self.pair.codes
    length = lambda spans, expert: sequence.region_length(spans, expert, self.model.config.multiple)
    codes, condition = last - first, self.model.config.condition
    prefix, seen = length(self.picture_spans, 'prefix'), codes if condition == 'cross' else 0
    return external.Lengths(
      length(self.spans, 'ar'),
      prefix - seen,
      length(self.picture_spans, 'dit'),
      codes if condition == 'keys' else 0,
      seen,
    )

  def _row(self, B: int, keep: bool) -> dict[str, Region]:
    """The picture expert's rows of any plans: the codes' ids aren't read there."""
    first, last = self.pair.codes
    return self._picture(jnp.zeros((B, last - first), jnp.int32), jnp.full((B,), keep))

  def _picture(self, codes: Array, keep: Array) -> dict[str, Region]:
    multiple = self.model.config.multiple
    return sequence.build(self.picture_spans, self.vocabulary, None, None, codes, keep, multiple)
