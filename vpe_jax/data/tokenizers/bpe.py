"""The tokenizer interface, and a small BPE trained on captions of the embedded training data.

`python -m vpe_jax.data.tokenizers.bpe` trains the BPE again and writes vpe_jax/assets/bpe.json.
"""

from __future__ import annotations

import abc
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import tokenizers
from absl import logging
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import openmoji, scenes
from vpe_jax.storage import SHIPPED_ASSETS, read_text, write_atomic

# [bot] and [eot] enclose a visual prompt, [boi] and [eoi] an image.
PAD, UNK, BOS, BOT, EOT, BOI, EOI, EOS = range(8)
SPECIALS = ('[pad]', '[unk]', '[bos]', '[bot]', '[eot]', '[boi]', '[eoi]', '[eos]')
VOCABULARY = 1024
SHIPPED = SHIPPED_ASSETS / 'bpe.json'

_SCENES = 4000  # number of scenes whose captions train the BPE
_WORDINGS = 4  # captions per OpenMoji emoji
_TYPOGRAPHY = {'“': '"', '”': '"', '‘': "'", '’': "'", '–': '-', '—': '-'}
_QUOTE = re.compile(r'"([^"]*)"')
# Common words that the data sets lack; without these prompts, the BPE would spell them in letters.
_GENERAL = (
  'a photo of a red fox in the snow',
  'five small birds sitting in a row on a wire',
  'the cat is sleeping on the chair near the window',
  'draw me one big yellow flower behind the old house',
  'a man and a woman walking in the park at night',
  'two people playing music in front of a large crowd',
  'an illustration of a boy holding a round balloon',
  'a simple cartoon of a girl riding a horse at the beach',
  'some food on a white plate with a cup of coffee',
  'show a dark sky full of stars over the sea',
  'a gray wolf, a brown bear and a golden lion',
  'a colorful painting with many different shapes',
  'inside of the box there are six or seven toys',
  'in the middle, at the top, at the bottom, in the corner',
)


def tidied(prompts: Sequence[str]) -> list[str]:
  """Prompts without surrounding white space.

  Raises:
    UserError: a prompt is blank.
  """
  # Some editors write a byte order mark (U+FEFF) at the start of a text.
  stripped = [re.sub(r'^[\s\ufeff]+|[\s\ufeff]+$', '', prompt) for prompt in prompts]
  if not all(stripped):
    raise UserError('a prompt is blank: describe the image to generate')
  return stripped


def read_prompts(path: str, name: str) -> list[str]:
  """The prompts of a text file, one per line; blank lines are skipped.

  Args:
    path: local or gs:// path of the file.
    name: name of the file in error messages.

  Raises:
    UserError: the file can't be read, or has no prompt.
  """
  lines = [line for line in read_text(path, name).split('\n') if line.strip()]
  if not lines:
    raise UserError(f'{name} is blank: write one prompt per line')
  return tidied(lines)


class Tokens(abc.ABC):
  """Interface of tokenizers.

  Attributes:
    pad: id of the padding token.
    special: id of each special token that a model may read.
  """

  pad: int
  special: Mapping[str, int] = MappingProxyType({})

  @property
  @abc.abstractmethod
  def vocabulary(self) -> int:
    """Number of tokens, including special tokens."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """The text of tokens, without special tokens."""

  @abc.abstractmethod
  def _ids(self, caption: str) -> list[int]:
    """Token ids of valid text, without special tokens."""

  def check_special(self, ids: Mapping[str, int]) -> None:
    """Checks that ids which a model reads as special tokens are special in this tokenizer.

    Args:
      ids: config field -> id.

    Raises:
      UserError: an id is that of ordinary text, or of nothing.
    """
    for field, index in ids.items():
      if index not in self.special.values():
        known = ', '.join(f'{name} {i}' for name, i in self.special.items())
        raise UserError(
          f'{field} is {index}, which is no special token of data.tokenizer: choose one of {known}'
        )

  def encode(self, caption: str) -> list[int]:
    """Token ids of one caption, without special tokens.

    Raises:
      UserError: the caption is not valid text, such as undecodable bytes.
    """
    try:
      caption.encode()
    except UnicodeEncodeError as error:
      raise UserError(f'caption or prompt is not valid text: {caption!r} ({error})') from error
    return self._ids(caption)

  def encode_batch(
    self, captions: Sequence[str], length: int, cut: bool = False
  ) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of captions as one padded array.

    Args:
      captions: B texts.
      length: T, the maximum number of tokens.
      cut: whether to truncate longer captions, with one warning; otherwise they are rejected.

    Returns:
      ids int32 [B, T], padded with `pad`; and the number of tokens of each caption, int32 [B].

    Raises:
      UserError: a caption is not valid text, or is too long and `cut` is false.
    """
    ids = np.full((len(captions), length), self.pad, np.int32)
    lengths = np.zeros(len(captions), np.int32)
    for index, caption in enumerate(captions):
      tokens = self.encode(caption)
      if len(tokens) > length and not cut:
        raise UserError(
          f'prompt has {len(tokens)} tokens and the limit is {length}; shorten it: {caption[:80]!r}'
        )
      if len(tokens) > length:
        logging.log_first_n(
          logging.WARNING,
          'captions over config.data.text_length=%d tokens are truncated; this one has %d: %r',
          1,
          length,
          len(tokens),
          caption[:80],
        )
      lengths[index] = min(len(tokens), length)
      ids[index, : lengths[index]] = tokens[:length]
    return ids, lengths


class Tokenizer(Tokens):
  """The small BPE of the embedded data sets."""

  pad = PAD
  special = dict(zip(SPECIALS, range(8), strict=True))

  def __init__(self, path: str | Path = SHIPPED):
    """Reads a tokenizer file that `write` made.

    Raises:
      UserError: the file does not exist, is damaged, or lacks the special tokens.
    """
    if not Path(path).is_file():
      raise UserError(
        f'no tokenizer at {path}; python -m vpe_jax.data.tokenizers.bpe writes the shipped one'
      )
    try:
      self._bpe = tokenizers.Tokenizer.from_str(read_text(path))
    except UserError:
      raise
    except Exception as error:  # The parser raises plain Exception.
      reason = ' '.join(str(error).split())
      raise UserError(f'tokenizer {path} is damaged ({reason}): install vpe_jax again') from error
    if tuple(self._bpe.id_to_token(i) for i in range(len(SPECIALS))) != SPECIALS:
      raise UserError(f'tokenizer {path} lacks the special tokens {" ".join(SPECIALS)}')
    # A prompt that contains the text of a special token is tokenized as ordinary text.
    self._bpe.encode_special_tokens = True

  @property
  def vocabulary(self) -> int:
    """Number of tokens, including special tokens."""
    return self._bpe.get_vocab_size()

  def text(self) -> str:
    """Content of the tokenizer file."""
    return self._bpe.to_str(pretty=True) + '\n'

  def _ids(self, caption: str) -> list[int]:
    """Token ids; text in quotation marks, which an image shows, is spelled letter by letter."""
    text = self._bpe.normalizer.normalize_str(caption)
    ids, start = [], 0
    for quote in _QUOTE.finditer(text):
      ids += self._encode(text[start : quote.start() + 1], start > 0)
      ids += [i for letter in quote[1] + '"' for i in self._encode(letter, True)]
      start = quote.end()
    return ids + self._encode(text[start:], start > 0)

  def _encode(self, text: str, after_mark: bool) -> list[int]:
    """Token ids of a part of a caption; `after_mark`: it follows a quotation mark directly."""
    if not after_mark:
      return self._bpe.encode(text, add_special_tokens=False).ids
    return self._bpe.encode(f'"{text}', add_special_tokens=False).ids[2:]  # without space and "

  def decode(self, ids: Iterable[int]) -> str:
    """The text of tokens, in lower case and without special tokens."""
    return self._bpe.decode([int(i) for i in ids if int(i) >= len(SPECIALS)])


@functools.cache
def shipped() -> Tokenizer:
  """The tokenizer in vpe_jax/assets."""
  return Tokenizer()


def train_bpe(captions: Iterable[str], vocabulary: int = VOCABULARY) -> tokenizers.Tokenizer:
  """Trains a BPE whose first ids are SPECIALS; deterministic."""
  bpe = tokenizers.Tokenizer(models.BPE(unk_token='[unk]'))
  typography = [normalizers.Replace(old, new) for old, new in _TYPOGRAPHY.items()]
  bpe.normalizer = normalizers.Sequence(
    [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), *typography]
  )
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation('isolated')]
  )
  bpe.decoder = decoders.Metaspace()
  printable = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary,
    special_tokens=list(SPECIALS),
    initial_alphabet=printable,
    show_progress=False,
  )
  bpe.train_from_iterator(captions, trainer)
  return bpe


def training_captions() -> list[str]:
  """Captions that train the shipped tokenizer; all are from training splits."""
  items = openmoji.of_split('train')
  emoji = [openmoji.caption_of(item, wording) for item in items for wording in range(_WORDINGS)]
  composed = [scenes.scene(0, index).caption for index in range(_SCENES)]
  return emoji + composed + list(_GENERAL) * 8  # 8 times: frequent words become tokens


def write(path: Path = SHIPPED) -> None:
  """Trains the shipped tokenizer and writes it."""
  write_atomic(path, train_bpe(training_captions()).to_str(pretty=True).encode() + b'\n')


if __name__ == '__main__':
  write()
