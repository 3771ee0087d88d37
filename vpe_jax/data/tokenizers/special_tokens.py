"""Special tokens of published language models, by family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Special tokens that a family of models expects.

  Attributes:
    vocabulary: number of tokens of the tokenizer, `added` included.
    pad: the padding token.
    ids: the id of each special token that a model reads.
    added: tokens that the family appends to the published tokenizer, in order.
  """

  vocabulary: int
  pad: str
  ids: Mapping[str, int]
  added: tuple[str, ...] = ()


_QWEN = {
  '<|endoftext|>': 151_643,
  '<|im_start|>': 151_644,
  '<|im_end|>': 151_645,
  '<|vision_start|>': 151_652,
  '<|vision_end|>': 151_653,
  '<|image_pad|>': 151_655,
}
_LLAMA = {
  '<|begin_of_text|>': 128_000,
  '<|end_of_text|>': 128_001,
  '<|start_header_id|>': 128_006,
  '<|end_header_id|>': 128_007,
  '<|eot_id|>': 128_009,
}

FAMILIES: Mapping[str, SpecialTokens] = {
  # Qwen2.5 and Qwen2.5-VL: 151,643 ordinary tokens and 22 special ones.
  'qwen2.5': SpecialTokens(151_665, '<|endoftext|>', _QWEN),
  # Llama 3.x: 128,000 ordinary tokens and 256 special ones; padding as in fine-tuning recipes.
  'llama3': SpecialTokens(128_256, '<|end_of_text|>', _LLAMA),
  # Show-o2 appends four tokens to those of Qwen2.5.
  'showo2': SpecialTokens(
    151_669,
    '[PAD]',
    {
      **_QWEN,
      '[PAD]': 151_665,
      '<image>': 151_666,
      '<|vid_start|>': 151_667,
      '<|vid_end|>': 151_668,
    },
    added=('[PAD]', '<image>', '<|vid_start|>', '<|vid_end|>'),
  ),
}
