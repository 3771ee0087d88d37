"""Tokenizers of published language models, with the special tokens that Show-o2 adds."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vpe_jax.config import CLASSES
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe, classes

# Tokens that Show-o2 appends to the 151,665 tokens of Qwen2.5, in this order.
SHOW_O2 = ('[PAD]', '<image>', '<|vid_start|>', '<|vid_end|>')
# Tokens that Show-o2 puts around text and images.
BOS, EOS, BOI, EOI = '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>'


class PublishedTokenizer(bpe.Tokens):
  """A tokenizer of `transformers.AutoTokenizer`.

  Attributes:
    pad: id of the padding token that Show-o2 adds.
  """

  def __init__(self, name: str):
    """Opens a tokenizer in a local folder, or downloads one from the hub.

    Args:
      name: a local folder, or an id on the Hugging Face hub such as `Qwen/Qwen2.5-1.5B-Instruct`.

    Raises:
      UserError: the tokenizer does not exist, or the hub can't be reached.
    """
    self.name = name
    self._tokenizer = _opened(name)
    self._tokenizer.add_special_tokens(
      {'additional_special_tokens': list(SHOW_O2)}, replace_extra_special_tokens=False
    )
    self.pad = self.id_of(SHOW_O2[0])

  @property
  def vocabulary(self) -> int:
    """Number of tokens, special and added ones included."""
    return len(self._tokenizer)

  def id_of(self, token: str) -> int:
    """The id of a special token.

    Raises:
      UserError: the tokenizer has no such token.
    """
    index = self._tokenizer.get_vocab().get(token)
    if index is None:
      raise UserError(f"tokenizer '{self.name}' has no token {token}: is it one of Qwen2.5?")
    return index

  def _ids(self, caption: str) -> list[int]:
    # A prompt that contains the text of a special token is tokenized as ordinary text.
    encoded = self._tokenizer(caption, add_special_tokens=False, split_special_tokens=True)
    return list(encoded['input_ids'])

  def decode(self, ids: Iterable[int]) -> str:
    """The text of tokens, without special tokens."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


@functools.cache
def open_tokenizer(name: str) -> bpe.Tokens:
  """The tokenizer that a config names: `assets:bpe` (shipped), a folder, a hub id, or classes.

  Raises:
    UserError: no tokenizer has this name.
  """
  if name.startswith(CLASSES):
    return classes.of_names(name.removeprefix(CLASSES))
  return bpe.shipped() if name == 'assets:bpe' else PublishedTokenizer(name)


def _opened(name: str) -> Any:
  import transformers  # Imported here because it is slow and only published models need it.

  path = Path(name).expanduser()
  if not path.is_dir() and (name.startswith(('/', '.', '~')) or name.count('/') != 1):
    raise UserError(
      f"no tokenizer at '{name}': name assets:bpe, a folder with a tokenizer.json, or a hub id "
      '(OWNER/NAME)'
    )
  try:
    source = str(path) if path.is_dir() else name
    return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
  except Exception as error:  # Client, transport and parser raise errors of many types.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"no tokenizer at '{name}' ({reason}): name a folder with a tokenizer, or a hub id on a "
      'machine that can reach the hub'
    ) from error
