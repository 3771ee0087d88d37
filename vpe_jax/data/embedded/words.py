"""Procedural images of written words: 1 to 3 words in one of five fonts, with exact ground truth.

Image i of seed s in a split is a pure function of (s, split, i). Each word has its own line. The
font size is at most the largest that fits and at least three quarters of it, so that the longest
words are legible at 64 x 64 pixels. Captions quote the words and name the font. All text is in
lower case, because the tokenizer of the embedded data sets lower-cases text.
"""

from __future__ import annotations

import dataclasses
import random

from vpe_jax.config import DataConfig, did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import shapes, splits
from vpe_jax.data.embedded.fonts import FONTS, ink
from vpe_jax.data.embedded.lettering import Lettering
from vpe_jax.data.embedded.naming import with_article
from vpe_jax.data.records import (
  DEFAULT_COUNT,
  ProceduralSource,
  Record,
  Split,
  Truth,
  Word,
  Writing,
)
from vpe_jax.storage import stable_hash

GROUP = 'words'
INKS = ('red', 'green', 'blue', 'purple', 'brown', 'black')  # legible on all backgrounds
_BACKGROUNDS = ('white', *shapes.TINTS)
_SHARES = {1: 0.5, 2: 0.3, 3: 0.2}  # number of words -> share of images
MOST_WORDS = max(_SHARES)
_MARGIN = 0.04  # as a fraction of the side
_MAX_EM, _LEGIBLE_EM = 0.6, 0.18  # font sizes, as fractions of the side
_MIN_FIT = 0.75  # minimum font size, as a fraction of the largest that fits
_GAP = 0.22  # space between lines, in ems
_TINTED_SHARE, _FADED_SHARE = 0.5, 0.4  # share of tinted backgrounds, and of gradients among them
_WORDINGS = 4096  # number of values of Record.wording

_FRAMES = (
  'the {words} {quote}',
  'the {words} {quote}',  # twice: double weight
  'a picture of the {words} {quote}',
  'a sign that says {quote}',
  'a poster that reads {quote}',
)
_STATED_SHARE = 0.6  # share of captions that state the ink colour, and that state the background


@dataclasses.dataclass(frozen=True)
class Words(ProceduralSource):
  """Images of written words of one split.

  `train` excludes held-out words, held-out pairs of words, and held-out pairs of word and font.

  Attributes:
    most_words: maximum number of words in an image, 1 to 3.
    fonts: names of the fonts.
  """

  most_words: int = MOST_WORDS
  fonts: tuple[str, ...] = FONTS

  def compose(self, index: int) -> Record:
    """See ProceduralSource."""
    return word_image(self.seed, index, self.split, self.most_words, self.fonts)


def open_words(config: DataConfig, split: Split, seed: int) -> Words:
  """Opens the source `words`; see vpe_jax.data.sources.Opener."""
  return of_config(config, config.examples or DEFAULT_COUNT, split, seed)


def of_config(config: DataConfig, count: int, split: Split, seed: int) -> Words:
  """Images of words with the number of words and the fonts of a config.

  Raises:
    UserError: a font is unknown.
  """
  for name in config.fonts:
    if name not in FONTS:
      raise UserError(f"config.data.fonts has '{name}'{did_you_mean(name, FONTS)}")
  return Words(count, split, seed, config.most_words, config.fonts or FONTS)


def word_image(
  seed: int,
  index: int,
  split: Split = 'train',
  most_words: int = MOST_WORDS,
  fonts: tuple[str, ...] = FONTS,
) -> Record:
  """Record number `index` of a seed and split, with at most `most_words` words."""
  rng = random.Random(stable_hash('words', seed, split, index))
  truth = splits.sample_of_split(split, lambda: _compose(rng, split, most_words, fonts))
  wording = rng.randrange(_WORDINGS)
  return Record(
    id=f'words/{split}/{seed}/{index}',
    caption=caption(truth, wording),
    group=GROUP,
    split=split,
    image=Lettering(truth),
    truth=truth,
    wording=wording,
  )


def caption(truth: Truth, wording: int) -> str:
  """The caption of an image of written words; `wording` selects the phrasing."""
  choose = random.Random(stable_hash('wording of words', wording))
  frame = choose.choice(_FRAMES)
  states_ink, states_background = choose.random() < _STATED_SHARE, choose.random() < _STATED_SHARE
  writing = truth.writing
  quote = '"' + ' '.join(word.text for word in writing.words) + '"'
  text = frame.format(words='word' if len(writing.words) == 1 else 'words', quote=quote)
  font = f'{writing.colour} {writing.font}' if states_ink else writing.font
  text += f' in {with_article(font)} font'
  if not states_background:
    return text
  return f'{text} on {truth.background}' + (f' and {truth.fade}' if truth.fade else '')


def _compose(
  rng: random.Random, split: Split, most_words: int, font_names: tuple[str, ...]
) -> Truth:
  shares = {count: share for count, share in _SHARES.items() if count <= most_words}
  (count,) = rng.choices(list(shares), list(shares.values()))
  texts = rng.sample(splits.trained_words(), count)
  if split == 'concept':
    texts[rng.randrange(count)] = rng.choice(splits.held_out_words())
  font, colour = rng.choice(font_names), rng.choice(INKS)
  background, fade = 'white', ''
  if rng.random() < _TINTED_SHARE:
    background = rng.choice(tuple(shapes.TINTS))
    others = [name for name in _BACKGROUNDS if name != background]
    fade = rng.choice(others) if rng.random() < _FADED_SHARE else ''
  words = _place_words(rng, font, texts)
  return Truth((), background=background, fade=fade, writing=Writing(words, font, colour))


def _place_words(rng: random.Random, font: str, texts: list[str]) -> tuple[Word, ...]:
  """Places the words on lines of one font size, completely inside the image."""
  boxes = [ink(font, text) for text in texts]
  width = max(right - left for left, _, right, _ in boxes)
  height = sum(bottom - top for _, top, _, bottom in boxes) + _GAP * (len(boxes) - 1)
  room = 1 - 2 * _MARGIN
  largest = min(room / width, room / height, _MAX_EM)
  em = rng.uniform(max(_MIN_FIT * largest, min(largest, _LEGIBLE_EM)), largest)
  left = _MARGIN + rng.uniform(0, room - width * em)
  top = _MARGIN + rng.uniform(0, room - height * em)
  is_centred, words = rng.random() < 0.5, []
  for text, box in zip(texts, boxes, strict=True):
    line_width, line_height = (box[2] - box[0]) * em, (box[3] - box[1]) * em
    line_left = left + (width * em - line_width) / 2 if is_centred else left
    words.append(Word(text, (line_left, top, line_left + line_width, top + line_height)))
    top += line_height + _GAP * em
  return tuple(words)
