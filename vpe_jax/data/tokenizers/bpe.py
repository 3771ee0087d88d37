"""Captions as tokens: a small BPE, trained on the embedded sets' training captions.

`python -m vpe_jax.data.tokenizers.bpe` trains it again and writes vpe_jax/assets/bpe.json.
"""

from __future__ import annotations

import abc
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from absl import logging
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import openmoji, scenes
from vpe_jax.storage import SHIPPED_ASSETS, read_text, write_atomic

PAD, UNK, BOS, BOT, EOT, BOI, EOI, EOS = range(8)
SPECIALS = ('[pad]', '[unk]', '[bos]', '[bot]', '[eot]', '[boi]', '[eoi]', '[eos]')
VOCABULARY = 1024
SHIPPED = SHIPPED_ASSETS / 'bpe.json'

_SCENES = 4000  # training scenes whose captions are read
_WORDINGS = 4  # captions of each OpenMoji drawing
_TYPOGRAPHY = {'“': '"', '”': '"', '‘': "'", '’': "'", '–': '-', '—': '-'}
# Words that people use in prompts and the sets don't: spelled in few tokens rather than letters.
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
  """Prompts as they are drawn, wherever they come from: without white space around them.

  Raises:
    UserError: one is blank.
  """
  # A byte order mark is what an editor leaves in front of a text.
  found = [re.sub(r'^[\s\ufeff]+|[\s\ufeff]+$', '', prompt) for prompt in prompts]
  if not all(found):
    raise UserError('a prompt is blank, so there is nothing to draw: say what the picture shows')
  return found


def read_prompts(path: str, name: str) -> list[str]:
  """The prompts of a text file, one a line; blank lines are none.

  Args:
    path: of the file, local or gs://.
    name: what mistakes call it.

  Raises:
    UserError: it can't be read, or has no prompt.
  """
  lines = [line for line in read_text(path, name).split('\n') if line.strip()]
  if not lines:
    raise UserError(f'{name} is blank, so there is nothing to draw: write a prompt a line')
  return tidied(lines)


class Tokens(abc.ABC):
  """Captions to tokens and back: what every tokenizer offers.

  Attributes:
    pad: the id that fills short captions.
  """

  pad: int

  @property
  @abc.abstractmethod
  def vocabulary(self) -> int:
    """Number of tokens, special ones included."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """The text of tokens; special ones are left out."""

  @abc.abstractmethod
  def _ids(self, caption: str) -> list[int]:
    """The tokens of valid text, without special ones."""

  def encode(self, caption: str) -> list[int]:
    """The tokens of one caption, without special ones.

    Raises:
      UserError: it holds what no text does, such as a byte that wasn't UTF-8.
    """
    try:
      caption.encode()
    except UnicodeEncodeError as error:
      raise UserError(f'caption or prompt is not valid text: {caption!r} ({error})') from error
    return self._ids(caption)

  def encode_batch(
    self, captions: Sequence[str], length: int, cut: bool = False
  ) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of captions as one array.

    Args:
      captions: B texts.
      length: T, the most tokens that one may have.
      cut: whether a longer one is cut, with one warning for all; otherwise it is refused.

    Returns:
      ids int32 [B, T], padded with `pad`, and the number of real tokens int32 [B].

    Raises:
      UserError: a caption is no text, or too long and not to be cut.
    """
    ids = np.full((len(captions), length), self.pad, np.int32)
    lengths = np.zeros(len(captions), np.int32)
    for row, caption in enumerate(captions):
      tokens = self.encode(caption)
      if len(tokens) > length and not cut:
        raise UserError(
          f'prompt has {len(tokens)} tokens and the limit is {length}; shorten it: {caption[:80]!r}'
        )
      if len(tokens) > length:
        logging.log_first_n(
          logging.WARNING,
          'captions over config.data.text_length=%d tokens are cut, such as this one of %d: %r',
          1,
          length,
          len(tokens),
          caption,
        )
      lengths[row] = min(len(tokens), length)
      ids[row, : lengths[row]] = tokens[:length]
    return ids, lengths


class Tokenizer(Tokens):
  """The small BPE of the embedded sets."""

  pad = PAD

  def __init__(self, path: str | Path = SHIPPED):
    """Reads a tokenizer file that `write` made.

    Raises:
      UserError: there is no such file or it isn't one of ours.
    """
    if not Path(path).is_file():
      raise UserError(
        f'no tokenizer at {path}; python -m vpe_jax.data.tokenizers.bpe writes the shipped one'
      )
    try:
      self._bpe = tokenizers.Tokenizer.from_str(read_text(path))
    except UserError:
      raise
    except Exception as error:  # The parser raises nothing narrower.
      reason = ' '.join(str(error).split())
      raise UserError(f'tokenizer {path} is damaged ({reason}): install vpe_jax again') from error
    if tuple(self._bpe.id_to_token(i) for i in range(len(SPECIALS))) != SPECIALS:
      raise UserError(f'tokenizer {path} lacks the special tokens {" ".join(SPECIALS)}')
    # A prompt that spells out a special token means its letters.
    self._bpe.encode_special_tokens = True

  @property
  def vocabulary(self) -> int:
    """Number of tokens, special ones included."""
    return self._bpe.get_vocab_size()

  def _ids(self, caption: str) -> list[int]:
    return self._bpe.encode(caption, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of tokens; special ones are left out. Letters come back in lower case."""
    return self._bpe.decode([int(i) for i in ids if int(i) >= len(SPECIALS)])


@functools.cache
def shipped() -> Tokenizer:
  """The tokenizer in vpe_jax/assets."""
  return Tokenizer()


def train_bpe(captions: Iterable[str], vocabulary: int = VOCABULARY) -> tokenizers.Tokenizer:
  """Trains a BPE with SPECIALS in front; equal captions give an equal tokenizer."""
  bpe = tokenizers.Tokenizer(models.BPE(unk_token='[unk]'))
  plain = [normalizers.Replace(odd, usual) for odd, usual in _TYPOGRAPHY.items()]
  bpe.normalizer = normalizers.Sequence(
    [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), *plain]
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
  """The captions that the shipped tokenizer is trained on: of the training splits alone."""
  drawings = openmoji.of_split('train')
  emoji = [openmoji.caption_of(item, words) for item in drawings for words in range(_WORDINGS)]
  composed = [scenes.scene(0, index).caption for index in range(_SCENES)]
  return emoji + composed + list(_GENERAL) * 8


def write(path: Path = SHIPPED) -> None:
  """Trains the shipped tokenizer and writes it."""
  write_atomic(path, train_bpe(training_captions()).to_str(pretty=True).encode() + b'\n')


if __name__ == '__main__':
  write()
