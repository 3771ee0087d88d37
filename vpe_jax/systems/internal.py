"""Tokens and picture in one row, joined by attention: Internal+VPE, `arch=internal`.

With `arch=single` one expert has both; the row is the same. Without visual prompt there is no plan
to learn, and `joint` is the only stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Examples, Params, Region, Stage
from vpe_jax.data import sequence
from vpe_jax.models import unified
from vpe_jax.systems import rendering

PLAN = Stage('plan', ('ar/', 'embed/'), {'next_token': 1.0}, ema=False, draws=False)
JOINT = Stage('joint', ('.*',), {'next_token': 1.0, 'flow': 1.0}, ema=True)
UNPLANNED = dataclasses.replace(JOINT, losses={'flow': 1.0})


class Internal:
  """The row, and what is done with it; systems/external.py has the same methods for two rows.

  Attributes:
    stages: by name, in their order.
    spans: the row, token expert first.
  """

  stages = {stage.name: stage for stage in (PLAN, JOINT)}

  def __init__(
    self, model: unified.Unified, vocabulary: sequence.Vocabulary, text: int, codes: int
  ) -> None:
    """`text` and `codes` are the tokens of a caption and of a plan; 0 codes are none at all."""
    if not codes:
      self.stages = {UNPLANNED.name: UNPLANNED}
    self.model = model
    self.vocabulary = vocabulary
    self.spans = sequence.text_to_image(text, codes, model.config.image_tokens)

  def regions(
    self, batch: Examples, codes: Array, keep: Array | Mapping[str, Array]
  ) -> dict[str, Region]:
    """The rows of a batch; where `keep` [B] is False, text and plan are absent.

    With a picture before `keep` is that of each condition: see sequence.build.
    """
    return sequence.build(
      self.spans,
      self.vocabulary,
      batch.text,
      batch.text_length,
      codes,
      keep,
      self.model.config.multiple,
    )

  def forward(
    self, params: Params, regions: dict[str, Region], noisy: tuple[Array, Array] | None
  ) -> tuple[Array, Array | None]:
    """Both experts over a batch.

    Args:
      params: of both.
      regions: the rows.
      noisy: latents [B, h, w, C] and Show-o2's clock [B]; None leaves the picture out.

    Returns:
      Final-norm hidden states of the token expert's region [B, L, D], and Show-o2's velocity.
    """
    if noisy is not None:
      return self.model(params, regions, *noisy)
    stream = self.model.token_stream(params, regions['ar'])
    return self.model.backbone(params, {'ar': stream})[0]['ar'], None

  def draw(
    self, params: Params, request: Examples, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Array]:
    """Codes [B, P] and latents [B, h, w, C] of a batch of requests."""
    return rendering.draw(self.job(settings), params, request, rng)

  def train_flops(self, stage: Stage, predicted: int) -> float:
    """Matrix FLOPs of one example; both stages train whatever they run.

    In `plan` the frozen picture expert doesn't run at all.
    """
    return unified.train_flops(self.model.config, *self._lengths(stage), predicted)

  def attention_flops(self, stage: Stage) -> tuple[float, float]:
    """Of one forward pass, what attention amounts to: where all is frozen, and elsewhere."""
    return 0.0, unified.attention_flops(self.model.config, *self._lengths(stage))

  def tokens(self, stage: Stage) -> int:
    """Tokens of both experts, or of the token expert alone in stage `plan`."""
    return sum(self._lengths(stage))

  def _lengths(self, stage: Stage) -> tuple[int, int]:
    length = lambda expert: sequence.region_length(self.spans, expert, self.model.config.multiple)
    return length('ar'), length('dit') if 'flow' in stage.losses else 0

  def job(self, settings: SampleConfig) -> rendering.Job:
    """What drawing and planning keep static."""
    return rendering.Job(self.model, self.spans, self.vocabulary, settings)
