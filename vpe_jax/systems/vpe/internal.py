"""Tokens and picture in one row, joined by attention: Internal+VPE, `arch=internal`.

With `arch=single` one expert has both; the row is the same. Without visual prompt there is no plan
to learn, and `joint` is the only stage.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params, Region, Stage
from vpe_jax.sequence.spans import Layout
from vpe_jax.systems.vpe import layouts, unified_sampler
from vpe_jax.systems.vpe.sequences import Rows

PLAN = Stage('plan', ('ar/', 'embed/'), {'next_token': 1.0}, ema=False, samples=False)
JOINT = Stage('joint', ('.*',), {'next_token': 1.0, 'flow': 1.0}, ema=True)
UNPLANNED = dataclasses.replace(JOINT, losses={'flow': 1.0})


class Internal(Rows):
  """The sequence of both experts; external.py has the same methods for two sequences."""

  stages = {stage.name: stage for stage in (PLAN, JOINT)}

  @functools.cached_property
  def layout(self) -> Layout:
    """The sequence, AR expert first."""
    lengths = (self.text, self.codes, self.model.config.image_tokens)
    return layouts.text_to_image(self.vocabulary, *lengths)

  def regions(
    self, batch: Batch, codes: Array, keep: Array | Mapping[str, Array]
  ) -> dict[str, Region]:
    """The rows of a batch; where `keep` [B] is False, text and plan are absent.

    With a picture before `keep` is that of each condition: see layouts.build.
    """
    return self.build(batch, codes, keep)

  def both(
    self,
    params: Params,
    regions: dict[str, Region],
    noisy: tuple[Array, Array],
    reference: Array | None,
  ) -> tuple[Array, Array]:
    """Both experts over a batch; see Rows.forward."""
    del reference
    return self.model(params, regions, *noisy)

  def draw(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Array]:
    """Codes [B, P] and latents [B, h, w, C] of a batch of requests."""
    return unified_sampler.draw(self, settings, params, request, rng)

  def tokens(self, stage: Stage) -> int:
    """Tokens of both experts, or of the token expert alone in stage `plan`."""
    return sum(self._lengths(stage))

  def _lengths(self, stage: Stage) -> tuple[int, int]:
    length = lambda expert: self.layout.region_length(expert, self.model.config.multiple)
    return length('ar'), length('dit') if 'flow' in stage.losses else 0


class Unplanned(Internal):
  """The row without visual prompt."""

  stages = {UNPLANNED.name: UNPLANNED}
