"""Pictures of written words by a seeded program: 1 to 3 words, with exact truth.

Renderable i of seed s in a split is a pure function of (s, split, i). Each word has a line of its own;
the lines are as large as fits, or a little smaller, so that the longest words can be read at 64 x
64 pixels. Captions quote the words and name their font. All is in lower case, as the embedded sets'
tokenizer knows no other.
"""

from __future__ import annotations

import random

from vpe_jax.data.embedded import fonts, shapes, splits
from vpe_jax.data.embedded.lettering import Lettering
from vpe_jax.data.embedded.naming import with_article
from vpe_jax.data.records import ProceduralSource, Record, Split, Truth, Word, Writing
from vpe_jax.storage import stable_hash

GROUP = 'words'
INKS = ('red', 'green', 'blue', 'purple', 'brown', 'black')  # those that stand out from any ground
_GROUNDS = ('white', *shapes.TINTS)
_SHARES = {1: 0.5, 2: 0.3, 3: 0.2}  # words in a picture -> share of pictures
_MARGIN = 0.04
_LARGEST, _SMALLEST = 0.6, 0.18  # ems, in fractions of the side
_STRAY = 0.75  # of the largest size that fits, the least that is drawn
_GAP = 0.22  # between lines, in ems
_TINTED, _FADED = 0.5, 0.4  # share of pictures on a ground that isn't plain white, and of these
_WORDINGS = 4096

_FRAMES = (
  'the {words} {quote}',
  'the {words} {quote}',
  'a picture of the {words} {quote}',
  'a sign that says {quote}',
  'a poster that reads {quote}',
)
_SAID = 0.6  # share of captions that name what is left to chance: the ink, the ground


class Words(ProceduralSource):
  """Pictures of words of one split.

  Training holds neither held-out combinations (two words in one picture, a word in a font) nor
  held-out words.
  """

  def compose(self, index: int) -> Record:
    """See ProceduralSource."""
    return picture(self.seed, index, self.split)


def picture(seed: int, index: int, split: Split = 'train') -> Record:
  """Renderable number `index` of a seed and split."""
  rng = random.Random(stable_hash('words', seed, split, index))
  truth = splits.first_of(split, lambda: _compose(rng, split))
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
  """The caption of a picture of words, in the words that the number `wording` chooses."""
  choose = random.Random(stable_hash('wording of words', wording))
  frame = choose.choice(_FRAMES)
  inked, grounded = choose.random() < _SAID, choose.random() < _SAID
  written = truth.writing
  quote = '"' + ' '.join(word.text for word in written.words) + '"'
  text = frame.format(words='word' if len(written.words) == 1 else 'words', quote=quote)
  font = f'{written.colour} {written.font}' if inked else written.font
  text += f' in {with_article(font)} font'
  if not grounded:
    return text
  return f'{text} on {truth.ground}' + (f' and {truth.fade}' if truth.fade else '')


def _compose(rng: random.Random, split: Split) -> Truth:
  (count,) = rng.choices(list(_SHARES), list(_SHARES.values()))
  texts = rng.sample(splits.trained_words(), count)
  if split == 'concept':
    texts[rng.randrange(count)] = rng.choice(splits.held_out_words())
  font, colour = rng.choice(fonts.FONTS), rng.choice(INKS)
  ground, fade = 'white', ''
  if rng.random() < _TINTED:
    ground = rng.choice(tuple(shapes.TINTS))
    others = [name for name in _GROUNDS if name != ground]
    fade = rng.choice(others) if rng.random() < _FADED else ''
  words = _placed(rng, font, texts)
  return Truth((), ground=ground, fade=fade, writing=Writing(words, font, colour))


def _placed(rng: random.Random, font: str, texts: list[str]) -> tuple[Word, ...]:
  """The words below one another, in one size and at a place that leaves them whole."""
  inks = [fonts.ink(font, text) for text in texts]
  width = max(right - left for left, _, right, _ in inks)
  height = sum(bottom - top for _, top, _, bottom in inks) + _GAP * (len(inks) - 1)
  room = 1 - 2 * _MARGIN
  most = min(room / width, room / height, _LARGEST)
  em = rng.uniform(max(_STRAY * most, min(most, _SMALLEST)), most)
  left = _MARGIN + rng.uniform(0, room - width * em)
  top = _MARGIN + rng.uniform(0, room - height * em)
  centred, placed = rng.random() < 0.5, []
  for text, ink in zip(texts, inks, strict=True):
    wide, tall = (ink[2] - ink[0]) * em, (ink[3] - ink[1]) * em
    start = left + (width * em - wide) / 2 if centred else left
    placed.append(Word(text, (start, top, start + wide, top + tall)))
    top += tall + _GAP * em
  return tuple(placed)
