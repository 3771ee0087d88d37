"""Base class of sequence layouts with one or two sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from vpe_jax.contracts import Array, Batch, Params, Region, Stage
from vpe_jax.models import mot, unified
from vpe_jax.objectives.flow_matching import FlowConfig
from vpe_jax.systems.vpe import layouts


@dataclasses.dataclass(frozen=True)
class Rows:
  """The base of systems/vpe/internal.py and systems/vpe/external.py.

  These add `layout`, the row that the plan is written in, `regions`, `both`, `draw` and
  `tokens`.

  Attributes:
    model: the network.
    vocabulary: joint ids of text and codes.
    text: tokens of a caption.
    codes: tokens of a plan; 0: there are no plans.
    flow: gives what the network predicts.
    stages: by name, in their order.
  """

  model: unified.Unified
  vocabulary: layouts.Vocabulary
  text: int
  codes: int
  flow: FlowConfig

  stages: ClassVar[Mapping[str, Stage]]

  def forward(
    self,
    params: Params,
    regions: dict[str, Region],
    noisy: tuple[Array, Array] | None,
    reference: Array | None = None,
  ) -> tuple[Array, Array | None]:
    """Both experts over a batch, or the token expert alone.

    Args:
      params: of both.
      regions: the rows.
      noisy: latents [B, h, w, C] and Show-o2's clock [B]; None leaves the picture out.
      reference: latents of the pictures before [B, h, w, C], where rows have some.

    Returns:
      Final-norm hidden states of the token expert's region [B, L, D], and Show-o2's velocity.
    """
    if noisy is not None:
      return self.both(params, regions, noisy, reference)
    stream = self.token_stream(params, regions['ar'], reference)
    return self.model.backbone(params, {'ar': stream})[0]['ar'], None

  def token_stream(self, params: Params, region: Region, reference: Array | None) -> mot.Stream:
    """The token expert's input."""
    del reference
    return self.model.token_stream(params, region)

  def head_streams(self, params: Params, stream: mot.Stream) -> dict[str, mot.Stream]:
    """The tokens' hidden states `stream.x` as the head takes them, from the first slot."""
    del params
    return {'ar': stream}

  def slot(self, name: str) -> int:
    """First slot of a span in its expert's region."""
    return self.layout.place(name)[0]

  def build(
    self, batch: Batch, codes: Array, keep: Array | Mapping[str, Array]
  ) -> dict[str, Region]:
    """The regions of `layout`; see layouts.build."""
    text = (batch.inputs['text'], batch.inputs['text_length'])
    multiple = self.model.config.multiple
    return layouts.build(self.layout, self.vocabulary, *text, codes, keep, multiple)
