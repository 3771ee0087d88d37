"""Tokenizers of published language models, with the special tokens of their families."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vpe_jax.config import CLASSES, did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe, classes
from vpe_jax.data.tokenizers.special_tokens import FAMILIES
from vpe_jax.storage import hub_name, write_atomic

BPE = 'bpe'  # `data.tokenizer=bpe:FILE`: a file that data/tokenizers/bpe.py wrote


class PublishedTokenizer(bpe.Tokens):
  """Converts text to tokens and back with `transformers.AutoTokenizer`.

  Attributes:
    pad: id of the padding token.
  """

  def __init__(self, family: str, name: str):
    """Opens a folder that holds a tokenizer, or fetches one from the hub.

    Args:
      family: a key of special_tokens.FAMILIES.
      name: a local folder, or an id on the Hugging Face hub such as `Qwen/Qwen2.5-1.5B-Instruct`,
        with `@REVISION` for another revision than the newest.

    Raises:
      UserError: there is no tokenizer, the hub is out of reach, or the tokens are not those of the
        family.
    """
    self.name = name
    self._tokenizer = _open(name)
    special = FAMILIES[family]
    if special.added:
      self._tokenizer.add_special_tokens(
        {'additional_special_tokens': list(special.added)}, replace_extra_special_tokens=False
      )
    if self.vocabulary != special.vocabulary:
      raise UserError(
        f"tokenizer '{name}' has {self.vocabulary} tokens and those of {family} have "
        f'{special.vocabulary}: name another tokenizer or family in data.tokenizer'
      )
    for token, expected in special.ids.items():
      if (actual := self.id_of(token)) != expected:
        raise UserError(
          f"tokenizer '{name}' gives {token} the id {actual} and {family} reads {expected}: name "
          'another tokenizer or family in data.tokenizer'
        )
    self.pad, self.special = special.ids[special.pad], special.ids

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
      raise UserError(
        f"tokenizer '{self.name}' has no token {token}: name another tokenizer in data.tokenizer"
      )
    return index

  def save(self, folder: Path) -> None:
    """Writes the files of the tokenizer."""
    self._tokenizer.save_pretrained(folder)

  def _ids(self, caption: str) -> list[int]:
    # A prompt that contains the text of a special token is tokenized as ordinary text.
    encoded = self._tokenizer(caption, add_special_tokens=False, split_special_tokens=True)
    return list(encoded['input_ids'])

  def decode(self, ids: Iterable[int]) -> str:
    """The text of tokens, without special tokens."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


@functools.cache
def open_tokenizer(name: str) -> bpe.Tokens:
  """The tokenizer that `data.tokenizer` names.

  Raises:
    UserError: the tokenizer doesn't exist, can't be read, or does not fit its family.
  """
  if name.startswith(CLASSES):
    return classes.of_names(name.removeprefix(CLASSES))
  if name == 'assets:bpe':
    return bpe.shipped()
  family, _, source = name.partition(':')
  if family == BPE:
    return bpe.Tokenizer(source)
  if family not in FAMILIES:
    raise UserError(
      f"data.tokenizer is '{name}', and no family of tokenizers is called '{family}'"
      f'{did_you_mean(family, (*FAMILIES, BPE, CLASSES[:-1]))}'
    )
  return PublishedTokenizer(family, source)


def copy_tokenizer(name: str, folder: Path, place: str) -> str:
  """Copies the files of the tokenizer that `data.tokenizer` names to a new folder.

  Args:
    name: value of `data.tokenizer`. Class names in the config itself need no file.
    folder: the new folder.
    place: name of this folder in the result.

  Returns:
    The value of `data.tokenizer` that names the copy.

  Raises:
    UserError: see `open_tokenizer`.
  """
  tokenizer = open_tokenizer(name)
  if isinstance(tokenizer, PublishedTokenizer):
    tokenizer.save(folder)
    return f'{name.partition(":")[0]}:{place}'
  if isinstance(tokenizer, bpe.Tokenizer):
    write_atomic(folder / 'tokenizer.json', tokenizer.text().encode())
    return f'{BPE}:{place}/tokenizer.json'
  if not name.endswith('.txt'):
    return name
  write_atomic(folder / 'classes.txt', '\n'.join(tokenizer.names).encode())
  return f'{CLASSES}{place}/classes.txt'


def _open(name: str) -> Any:
  import transformers  # Imported here because it is slow and only published models need it.

  path, model = Path(name).expanduser(), hub_name(name)
  if not path.is_dir() and model is None:
    raise UserError(
      f"no tokenizer at '{name}': name a folder with a tokenizer.json, or a hub id (OWNER/NAME)"
    )
  try:
    source, revision = (str(path), 'main') if model is None else (model.repo, model.revision)
    return transformers.AutoTokenizer.from_pretrained(
      source, revision=revision or 'main', trust_remote_code=False
    )
  except Exception as error:  # Client, transport and parser raise errors of many types.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"no tokenizer at '{name}' ({reason}): name a folder with a tokenizer, or a hub id on a "
      'machine that can reach the hub'
    ) from error
