"""Edits of OpenMoji: pairs of variants, and their instructions."""

from __future__ import annotations

import collections

import pytest

from vpe_jax.data.embedded import emoji_edits, openmoji, splits
from vpe_jax.data.records import SPLITS, edit_mask
from vpe_jax.data.tokenizers import bpe


def _record(before: str, after: str):
  """The record of a pair of emoji codes; None if they are no pair."""
  for split in SPLITS:
    for index, (_, source, target) in enumerate(emoji_edits.pairs(split)):
      if (source.code, target.code) == (before, after):
        return emoji_edits.EmojiEdits(0, split)[index]
  return None


@pytest.mark.parametrize(
  'before, after, kind, words',
  [
    ('1F44B', '1F44B-1F3FF', 'skin tone', 'dark'),
    ('1F44B-1F3FF', '1F44B', 'skin tone', 'yellow'),
    ('1F468', '1F468-200D-1F9B0', 'hair', 'the man red hair'),
    ('1F469', '1F469-200D-1F9B2', 'hair', 'the woman bald'),
    ('1F9D1-200D-1F33E', '1F469-200D-1F33E', 'gender', 'the person'),
  ],
)
def test_known_pairs(before, after, kind, words):
  record = _record(before, after)
  assert record.edit.kind == kind
  assert all(word in record.caption for word in words.split()), record.caption
  assert record.truth == openmoji.truth_of(openmoji.emojis()[after])
  assert record.edit.before == openmoji.truth_of(openmoji.emojis()[before])
  mask = edit_mask(record, 32)
  assert mask.any() and not mask.all()


@pytest.mark.parametrize(
  'before, after',
  [
    ('1F44B-1F3FF', '1F468'),  # of another family
    ('1F468-200D-1F9B0', '1F468'),  # the target's name mentions no hair
    ('1F468-1F3FF', '1F469'),  # two changes at once
  ],
)
def test_other_emoji_are_no_pairs(before, after):
  assert _record(before, after) is None


def test_pairs_are_of_all_kinds_and_repeat_in_other_wordings():
  kinds = collections.Counter(kind for kind, _, _ in emoji_edits.pairs('train'))
  assert set(kinds) == set(emoji_edits.KINDS) and min(kinds.values()) > 30
  once = len(emoji_edits.pairs('train'))
  twice = emoji_edits.EmojiEdits(2 * once)
  assert twice[3].truth == twice[once + 3].truth and twice[3].id != twice[once + 3].id
  assert sum(twice[i].caption != twice[once + i].caption for i in range(30)) > 10
  with pytest.raises(IndexError):
    twice[2 * once]


@pytest.mark.parametrize('split', SPLITS)
def test_edits_belong_to_their_split_and_instructions_are_short(split):
  source, tokenizer = emoji_edits.EmojiEdits(0, split), bpe.shipped()
  for index in range(0, len(source), max(1, len(source) // 200)):
    record = source[index]
    assert splits.split_of_edit(record.edit.before, record.truth) == record.split == split
    assert len(tokenizer.encode(record.caption)) <= 32
