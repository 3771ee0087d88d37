"""Host-side preprocessing that systems share: prompts to tokens, images to arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import near_misses
from vpe_jax.data.records import Record, render
from vpe_jax.data.tokenizers import bpe
from vpe_jax.data.tokenizers.published import open_tokenizer


@dataclasses.dataclass(frozen=True)
class PromptAndImage:
  """Prompt tokens and images of a record; see vpe_jax.contracts.Preprocess.

  Returns `text` int32 [T] and `text_length` int32 []. On request also `image` and `source_image`,
  uint8 [R, R, 3]; the image at another size, for encoders that read it at that size; and `near`
  int32 [M, T] with `near_length` int32 [M]: captions that are wrong in one detail, padded with
  captions of length 0 if the record has fewer than M. T is `data.text_length`, R
  `data.image_size`, M `data.near_misses`.

  Attributes:
    tokenizer: converts prompts to token ids.
    data: data section of the config: the sizes above, and the field that is the prompt.
    views: name -> side in pixels of the image at other sizes, each resized from the original image.
  """

  tokenizer: bpe.Tokens
  data: DataConfig
  views: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def prompt(self, record: Record) -> str:
    """The caption of a record, or its class name (`data.prompt_field`)."""
    return record.caption if self.data.prompt_field == 'caption' else record.group

  def __call__(
    self, record: Record, names: Collection[str], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """See vpe_jax.contracts.Preprocess; nothing here is random."""
    del rng
    size = self.data.image_size
    ids, lengths = self._tokens([self.prompt(record)])
    arrays = {'text': ids[0], 'text_length': lengths[0]}
    if 'near' in names:
      arrays |= self._near_misses(record)
    if 'image' in names:
      arrays['image'] = render(record, size)
    if 'source_image' in names:
      arrays['source_image'] = record.reference.render(size)
    views = {name: render(record, side) for name, side in self.views.items() if name in names}
    return arrays | views

  def _tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return self.tokenizer.encode_batch(texts, self.data.text_length, cut=True)

  def _near_misses(self, record: Record) -> dict[str, np.ndarray]:
    count = self.data.near_misses
    near = np.zeros((count, self.data.text_length), np.int32)
    length = np.zeros(count, np.int32)
    captions = near_misses.near_misses(record, count)
    if captions:
      near[: len(captions)], length[: len(captions)] = self._tokens(captions)
    return {'near': near, 'near_length': length}


def prompt_and_image(
  data: DataConfig,
  field: str = '',
  rows: int = 0,
  special: Mapping[str, int] | None = None,
  views: Mapping[str, int] | None = None,
) -> PromptAndImage:
  """Preprocessing for systems that read prompts and images.

  Args:
    data: data section of the config.
    field: config field with the size of the embedding table; empty if the system has no table.
    rows: number of rows of that table.
    special: config field -> id that the model reads as a special token.
    views: see PromptAndImage.

  Raises:
    UserError: the tokenizer does not exist, has more tokens than the table has rows, or reads a
      special id as text.
  """
  tokenizer = open_tokenizer(data.tokenizer)
  if field and tokenizer.vocabulary > rows:
    raise UserError(
      f"tokenizer '{data.tokenizer}' has {tokenizer.vocabulary} tokens, but {field} is {rows}: "
      'the embedding table needs a row for each token'
    )
  tokenizer.check_special(special or {})
  return PromptAndImage(tokenizer, data, views or {})
