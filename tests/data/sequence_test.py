"""Rows of tokens: masks as drawn, positions without gaps, drops, targets."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import concatenate, visible
from vpe_jax.data import sequence

VOCABULARY = sequence.Vocabulary(text=10, codes=4, bos=1, boi=2)
SPANS = sequence.text_to_image(text=3, codes=2, latents=2)


def _build(lengths: list[int], keep: list[bool], multiple: int = 1):
  B = len(lengths)
  text = jnp.broadcast_to(jnp.array([5, 6, 7]), (B, 3))
  codes = jnp.broadcast_to(jnp.array([0, 3]), (B, 2))
  return sequence.build(
    SPANS, VOCABULARY, text, jnp.array(lengths), codes, jnp.array(keep), multiple
  )


def _mask(regions) -> np.ndarray:
  row = concatenate([region.visibility for region in regions.values()])
  return np.asarray(visible(row, row)).astype(int)


def test_mask_as_drawn():
  """bos, 2 of 3 text tokens, bot, 2 codes, eot, boi | time, 2 latents: causal, then full."""
  drawn = """
    1 0 0 0 0 0 0 0 0 0 0 0
    1 1 0 0 0 0 0 0 0 0 0 0
    1 1 1 0 0 0 0 0 0 0 0 0
    0 0 0 0 0 0 0 0 0 0 0 0
    1 1 1 0 1 0 0 0 0 0 0 0
    1 1 1 0 1 1 0 0 0 0 0 0
    1 1 1 0 1 1 1 0 0 0 0 0
    1 1 1 0 1 1 1 1 0 0 0 0
    1 1 1 0 1 1 1 1 1 0 0 0
    1 1 1 0 1 1 1 1 1 1 1 1
    1 1 1 0 1 1 1 1 1 1 1 1
    1 1 1 0 1 1 1 1 1 1 1 1
  """
  wanted = np.array([[int(x) for x in line.split()] for line in drawn.strip().splitlines()])
  np.testing.assert_array_equal(_mask(_build([2], [True]))[0], wanted)


def test_ids_targets_and_weights():
  region = _build([2], [True])['ar']
  np.testing.assert_array_equal(region.ids[0], [1, 5, 6, 7, 14, 10, 13, 15, 2])
  np.testing.assert_array_equal(region.weights[0], [0, 0, 0, 0, 1, 1, 1, 0, 0])
  # [bot] predicts the first code, the last code predicts [eot].
  np.testing.assert_array_equal(region.targets[0, 4:7], [10, 13, 15])


def test_positions_count_present_tokens():
  regions = _build([2, 3, 0], [True, True, True])
  np.testing.assert_array_equal(regions['ar'].positions[0], [0, 1, 2, 0, 3, 4, 5, 6, 7])
  np.testing.assert_array_equal(regions['ar'].positions[1], [0, 1, 2, 3, 4, 5, 6, 7, 8])
  np.testing.assert_array_equal(regions['dit'].positions[:, 0], [8, 9, 6])


def test_dropped_condition_leaves_bos_and_boi():
  regions = _build([3], [False])
  present = np.asarray(regions['ar'].visibility.until[0] > 0)
  np.testing.assert_array_equal(present, [1, 0, 0, 0, 0, 0, 0, 0, 1])
  np.testing.assert_array_equal(regions['dit'].positions[0], [2, 3, 4])
  assert float(regions['ar'].weights.sum()) == 0
  mask = _mask(regions)[0]
  np.testing.assert_array_equal(mask[9:].sum(1), [5, 5, 5])
  assert mask[1:8].sum() == 0 and mask[:, 1:8].sum() == 0


@pytest.mark.parametrize('multiple', [4, 16])
def test_padding_changes_nothing(multiple):
  plain, padded = _build([2, 1], [True, False]), _build([2, 1], [True, False], multiple)
  for expert, region in plain.items():
    length = region.ids.shape[1]
    assert padded[expert].ids.shape[1] % multiple == 0
    pairs = zip(jax.tree.leaves(region), jax.tree.leaves(padded[expert]), strict=True)
    for before, after in pairs:
      np.testing.assert_array_equal(before, after[:, :length])
      assert not np.any(after[:, length:])


def test_places():
  assert sequence.place(SPANS, 'codes') == (5, 7)
  assert sequence.place(SPANS, 'latents') == (1, 3)
  assert sequence.region_length(SPANS, 'ar', 16) == 16
  with pytest.raises(KeyError):
    sequence.place(SPANS, 'video')


def test_picture_row_has_the_mask_that_its_docstring_draws():
  drawing = re.findall(r'^ +\w+((?: +[01])+)$', sequence.picture_row.__doc__, re.MULTILINE)
  wanted = np.array([[int(x) for x in line.split()] for line in drawing])
  codes = jnp.zeros((2, 2), jnp.int32)
  row = sequence.picture_row(codes=2, latents=2)
  regions = sequence.build(row, VOCABULARY, None, None, codes, jnp.array([True, False]), 4)
  assert [region.ids.shape[1] for region in regions.values()] == [4, 4]
  present = np.array([0, 1, 2, 4, 5, 6])  # Each region is padded by one.
  whole, dropped = _mask(regions)
  np.testing.assert_array_equal(whole[present][:, present], wanted)
  np.testing.assert_array_equal(dropped[present][:, present], wanted * (present > 1))
  assert whole.sum() == wanted.sum() and dropped.sum() == wanted[:, 2:].sum()
  positions = np.concatenate([region.positions for region in regions.values()], 1)[:, present]
  np.testing.assert_array_equal(positions, [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])


def test_without_codes_the_row_is_show_o2s():
  spans = sequence.text_to_image(text=3, codes=0, latents=2)
  assert [span.kind for span in spans] == ['bos', 'text', 'boi', 'time', 'latents']
  vocabulary, none = sequence.Vocabulary(10, 0, 1, 2), jnp.zeros((2, 0), jnp.int32)
  text, keep = jnp.broadcast_to(jnp.array([5, 6, 7]), (2, 3)), jnp.array([True, False])
  regions = sequence.build(spans, vocabulary, text, jnp.array([2, 3]), none, keep)
  np.testing.assert_array_equal(regions['ar'].ids[0], [1, 5, 6, 7, 2])
  np.testing.assert_array_equal(regions['ar'].positions, [[0, 1, 2, 0, 3], [0, 0, 0, 0, 1]])
  np.testing.assert_array_equal(regions['dit'].positions, [[4, 5, 6], [2, 3, 4]])
  assert not regions['ar'].weights.any()
  np.testing.assert_array_equal(_mask(regions)[0][5:], [[1, 1, 1, 0, 1, 1, 1, 1]] * 3)


def test_token_row_is_the_joint_row_before_boi():
  assert sequence.token_row(3, 2) == SPANS[:5] and SPANS[5].kind == 'boi'


EDITS = sequence.Vocabulary(text=10, codes=4, bos=1, boi=2, eoi=3)


def _told(spans, keep):
  """Regions of four rows, and of each row its present tokens: (kind, id, place)."""
  text = jnp.broadcast_to(jnp.array([5, 6, 7]), (4, 3))
  codes = jnp.broadcast_to(jnp.array([0, 3]), (4, 2))
  regions = sequence.build(spans, EDITS, text, jnp.full((4,), 2), codes, keep, 4)
  kinds = {expert: [] for expert in regions}
  for span in spans:
    kinds[span.expert] += [span.kind] * span.length
  rows = []
  for row in range(4):
    found = []
    for expert, region in regions.items():
      for slot, kind in enumerate(kinds[expert]):
        if region.visibility.until[row, slot]:
          found.append((kind, int(region.ids[row, slot]), int(region.positions[row, slot])))
      assert not region.visibility.until[row, len(kinds[expert]) :].any()
    rows.append(found)
  return regions, rows


def _numbered(*tokens) -> list[tuple]:
  return [(kind, token, place) for place, (kind, token) in enumerate(tokens)]


_BOS, _BOI = [('bos', 1)], [('boi', 2)]
_REF = [('ref_boi', 2), ('ref_time', 0), ('ref_latents', 0), ('ref_latents', 0), ('eoi', 3)]
_TEXT = [('text', 5), ('text', 6)]
_PLAN = [('bot', 14), ('codes', 10), ('codes', 13), ('eot', 15)]
_PICTURE = [('time', 0), ('latents', 0), ('latents', 0)]
_TOLD = jnp.array([True, False, True, False])
_REFERENCE = jnp.array([True, True, False, False])
_KEEP = {sequence.TOLD: _TOLD, sequence.REFERENCE: _REFERENCE}


def test_the_four_rows_of_internal_edits_are_those_of_appendix_d():
  """Full, No-text, No-ref, Null, token by token; the tail `[eoi] [eos]` is left out."""
  spans = sequence.edit(text=3, codes=2, latents=2)
  regions, rows = _told(spans, _KEEP)
  assert rows == [
    _numbered(*_BOS, *_REF, *_TEXT, *_PLAN, *_BOI, *_PICTURE),
    _numbered(*_BOS, *_REF, *_BOI, *_PICTURE),
    _numbered(*_BOS, *_TEXT, *_PLAN, *_BOI, *_PICTURE),
    _numbered(*_BOS, *_BOI, *_PICTURE),
  ]
  # Only what is kept predicts: [bot] and the codes.
  np.testing.assert_array_equal(regions['ar'].weights.sum(1), [3, 0, 3, 0])
  first, last = sequence.place(spans, 'bot')[0], sequence.place(spans, 'codes')[1]
  np.testing.assert_array_equal(regions['ar'].targets[0, first:last], [10, 13, 15])


def test_the_three_rows_of_external_edits_are_those_of_appendix_d():
  spans = sequence.edit_tokens(text=3, codes=2, latents=2)
  regions, rows = _told(spans, _KEEP)
  assert rows[:3] == [
    _numbered(*_BOS, *_REF, *_TEXT, *_PLAN),
    _numbered(*_BOS, *_REF, *_PLAN),
    _numbered(*_BOS, *_TEXT, *_PLAN),
  ]
  np.testing.assert_array_equal(regions['ar'].weights.sum(1), [3, 3, 3, 3])


def test_rows_of_edits_without_picture_before_are_those_of_text_to_image():
  ours, _ = _told(sequence.edit(3, 2, 2), {**_KEEP, sequence.REFERENCE: jnp.zeros(4, bool)})
  theirs, _ = _told(SPANS, _TOLD)
  mask, wanted = _mask(ours), _mask(theirs)
  present = np.asarray(concatenate([r.visibility for r in ours.values()]).until > 0)
  kept = np.asarray(concatenate([r.visibility for r in theirs.values()]).until > 0)
  for row in range(4):
    here, there = present[row], kept[row]
    np.testing.assert_array_equal(mask[row][here][:, here], wanted[row][there][:, there])


def test_row_of_an_edit_has_the_mask_that_its_docstring_draws():
  drawing = re.findall(r'^ +\w+((?: +[01])+)$', sequence.edit.__doc__, re.MULTILINE)
  wanted = np.array([[int(x) for x in line.split()] for line in drawing])
  spans = sequence.edit(text=1, codes=1, latents=2)
  one = jnp.ones((1, 1), jnp.int32)
  keep = jnp.array([True])
  mask = _mask(sequence.build(spans, EDITS, one, jnp.array([1]), one, keep))
  assert wanted.shape == (14, 14)
  np.testing.assert_array_equal(mask[0], wanted)


def test_a_picture_before_adds_1027_tokens_at_paper_size():
  count = lambda spans: sum(span.length for span in spans)
  added = count(sequence.edit(249, 576, 1024)) - count(sequence.text_to_image(249, 576, 1024))
  assert added == 1027
  # With [eoi] [eos], which nothing sees, the paper's 2,883.
  assert count(sequence.edit(249, 576, 1024)) + 2 == 2883
