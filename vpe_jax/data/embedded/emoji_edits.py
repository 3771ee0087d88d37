"""Edits of OpenMoji: two variants of one emoji that differ in skin tone, hair or gender only."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

from vpe_jax.data.embedded import openmoji, splits
from vpe_jax.data.embedded.naming import with_article
from vpe_jax.data.embedded.openmoji import Emoji
from vpe_jax.data.embedded.painting import Drawing
from vpe_jax.data.records import Edit, Record, Split
from vpe_jax.storage import stable_hash

KINDS = ('skin tone', 'hair', 'gender')

_TONE = ('change the skin tone to {}', 'make the skin tone {}', 'give it a {} skin tone')
_HAIR = ('give the {} {}', 'change the hair of the {} to {}')
_BALD = ('make the {} {}', 'turn the {} {}')
_GENDER = ('change the {} into {}', 'turn the {} into {}', 'replace the {} with {}')
_NO_TONE = 'yellow'  # colour of emoji without a skin tone
_PERSON = 'person'  # noun for emoji without a gender


@dataclasses.dataclass(frozen=True)
class EmojiEdits:
  """Edits of one split as a source: each changes a variant of an emoji into another.

  Attributes:
    count: number of records; 0 for each edit once. A larger count repeats the edits with other
      wordings.
    split: `train` or a held-out split.
    seed: selects other wordings.
  """

  count: int = 0
  split: Split = 'train'
  seed: int = 0

  def __len__(self) -> int:
    return self.count or len(pairs(self.split))

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f'emoji edit {index} of {len(self)}')
    repeat, position = divmod(index, len(pairs(self.split)))
    kind, before, after = pairs(self.split)[position]
    number = stable_hash('emoji edit', self.seed, index) % 4096
    return Record(
      id=f'emoji_edit/{before.code}/{after.code}/{repeat}',
      caption=_instruction(kind, before, after, number),
      group=after.group,
      split=self.split,
      image=Drawing(after.code),
      truth=openmoji.truth_of(after),
      wording=number,
      reference=Drawing(before.code),
      edit=Edit(kind, openmoji.truth_of(before)),
    )


@functools.cache
def pairs(split: Split) -> tuple[tuple[str, Emoji, Emoji], ...]:
  """(kind of edit, before, after) of every pair of one split, in a fixed pseudo-random order."""
  matches = []
  split_of = {c: splits.split_of_truth(openmoji.truth_of(i)) for c, i in openmoji.emojis().items()}
  for base in {item.base for item in openmoji.emojis().values() if item.variant}:
    members = [openmoji.emojis()[base], *openmoji.variants(base)]
    aspects = {item.code: _aspects(item) for item in members}
    # Emoji of several people are skipped: an instruction would have to identify one of them.
    members = [item for item in members if all(len(part) < 2 for part in aspects[item.code])]
    for before, after in itertools.permutations(members, 2):
      old, new = aspects[before.code], aspects[after.code]
      kinds = [kind for kind, a, b in zip(KINDS, old, new, strict=True) if a != b]
      # Edits that only remove a hair attribute are skipped: no instruction describes them.
      if len(kinds) == 1 and (kinds != ['hair'] or new[1]):
        if splits.stricter_split(split_of[before.code], split_of[after.code]) == split:
          matches.append((kinds[0], before, after))
  return tuple(sorted(matches, key=lambda pair: stable_hash('pair', pair[1].code, pair[2].code)))


def _aspects(item: Emoji) -> tuple[tuple[str, ...], ...]:
  """Skin tones, hair and genders of an emoji, in the order of KINDS."""
  select = lambda names: tuple(word for word in item.variant if word in names)
  return item.tones, select(openmoji.HAIR), select(openmoji.GENDERS)


def _instruction(kind: str, before: Emoji, after: Emoji, wording: int) -> str:
  """The instruction of an edit; `wording` selects the phrasing."""
  choose = random.Random(stable_hash('wording of edits', wording))
  who = (_aspects(before)[2] or (_PERSON,))[0]
  tones, hair, genders = _aspects(after)
  if kind == 'skin tone':
    tone = tones[0].removesuffix(' skin tone') if tones else _NO_TONE
    return choose.choice(_TONE).format(tone)
  if kind == 'hair':
    return choose.choice(_BALD if hair == ('bald',) else _HAIR).format(who, hair[0])
  return choose.choice(_GENDER).format(who, with_article((genders or (_PERSON,))[0]))
