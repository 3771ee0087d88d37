"""Edits of scenes: pure functions of (seed, split, index) with exact instructions and masks."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from vpe_jax.data.embedded import edits, near_misses, splits, vocabulary
from vpe_jax.data.records import SPLITS, Truth, edit_mask, render
from vpe_jax.data.tokenizers import bpe

SIZE = 48


@pytest.fixture(scope='module')
def sample():
  return [edits.edit(5, index) for index in range(400)]


def test_edit_is_a_pure_function():
  again = edits.Edits(100, 'train', 5)
  assert again[37] == edits.edit(5, 37) == again[37]
  assert edits.edit(5, 37) != edits.edit(6, 37)
  with pytest.raises(IndexError):
    again[100]


def test_known_edits_do_not_change():
  """A change of the generator would silently change the data of every run."""
  assert [edits.edit(0, i).caption for i in range(4)] == [
    'draw two purple circles above the small green triangle',
    'paint the orange square brown',
    'shift the brown triangle to the bottom left corner',
    'make the four brown squares blue',
  ]


def test_edits_are_of_all_kinds(sample):
  kinds = collections.Counter(record.edit.kind for record in sample)
  assert set(kinds) == {'add', 'remove', 'recolour', 'replace', 'move'}
  assert min(kinds.values()) > 40
  assert len({record.caption for record in sample}) > 350
  assert near_misses.near_misses(sample[0], 3) == []


def _objects(truth: Truth) -> collections.Counter:
  return collections.Counter((c.name, c.colour, box) for c in truth.clusters for box in c.boxes)


def test_one_cluster_differs_and_the_instruction_names_it(sample):
  for record in sample:
    before, after, caption = _objects(record.edit.before), _objects(record.truth), record.caption
    removed, added = before - after, after - before
    assert record.edit.before.background == record.truth.background
    names = [{name for name, _, _ in part} for part in (removed, added)]
    expected = {
      'add': (0, 1),
      'remove': (1, 0),
      'recolour': (1, 1),
      'replace': (1, 1),
      'move': (1, 1),
    }[record.edit.kind]
    assert tuple(map(len, names)) == expected, caption
    for name in set.union(*names):
      assert name in caption or vocabulary.plural(name) in caption, caption
    if record.edit.kind == 'recolour':
      assert {box for *_, box in removed} == {box for *_, box in added} and names[0] == names[1]
      assert all(colour in caption for _, colour, _ in (*removed, *added))


def test_the_mask_covers_the_changed_objects(sample):
  """All changed pixels are in boxes of removed or added objects, and each box has some."""
  for record in sample[:120]:
    mask = edit_mask(record, SIZE)
    before, after = _objects(record.edit.before), _objects(record.truth)
    boxes = [box for *_, box in (*(before - after), *(after - before))]
    near = np.zeros_like(mask)
    for left, top, right, bottom in boxes:
      area = (
        slice(max(int(top * SIZE) - 2, 0), int(bottom * SIZE) + 3),
        slice(max(int(left * SIZE) - 2, 0), int(right * SIZE) + 3),
      )
      assert mask[area].any(), record.caption
      near[area] = True
    assert mask.any() and not (mask & ~near).any(), record.caption
    unchanged = render(record, SIZE)[~mask] == record.reference.render(SIZE)[~mask]
    assert unchanged.all()


def test_instructions_of_moves_state_the_target(sample):
  moves = [record for record in sample if record.edit.kind == 'move']
  assert any(record.truth.relations for record in moves)
  for record in moves:
    left, top, right, bottom = record.truth.clusters[0].boxes[0]
    if not record.truth.relations:
      x, y = (left + right) / 2, (top + bottom) / 2
      corner = f'{"top" if y < 0.5 else "bottom"} {"left" if x < 0.5 else "right"} corner'
      assert record.caption.endswith(corner)
      continue
    (relation,) = record.truth.relations
    anchor = record.truth.clusters[1].boxes[0]
    assert {
      'left': right <= anchor[0],
      'right': left >= anchor[2],
      'above': bottom <= anchor[1],
      'below': top >= anchor[3],
    }[relation.word], record.caption


@pytest.mark.parametrize('split', SPLITS)
def test_edits_belong_to_their_split_and_instructions_are_short(split):
  tokenizer = bpe.shipped()
  for index in range(150):
    record = edits.edit(1, index, split)
    assert splits.split_of_edit(record.edit.before, record.truth) == record.split == split
    truths = (record.edit.before, record.truth)
    assert split != 'train' or {splits.split_of_truth(truth) for truth in truths} == {'train'}
    assert len(tokenizer.encode(record.caption)) <= 40
