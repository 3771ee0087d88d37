"""Token sequences of VPE: equal to golden arrays, masks of docstrings, sequences of App. D."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import concatenate, visible
from vpe_jax.systems.vpe import layouts

GOLDEN = json.loads((Path(__file__).parents[2] / 'golden' / 'vpe_layouts.json').read_text())
VOCABULARY = layouts.Vocabulary(text=10, codes=4, bos=1, boi=2, eoi=3)
LAYOUTS = {
  'ar_sequence': layouts.ar_sequence(VOCABULARY, 3, 2),
  'text_to_image': layouts.text_to_image(VOCABULARY, 3, 2, 2),
  'text_to_image_without_codes': layouts.text_to_image(VOCABULARY, 3, 0, 2),
  'diffusion_sequence': layouts.diffusion_sequence(VOCABULARY, 2, 2),
  'edit': layouts.edit(VOCABULARY, 3, 2, 2),
  'edit_ar_sequence': layouts.edit_ar_sequence(VOCABULARY, 3, 2, 2),
}
ALL = jnp.ones(4, bool)
KEEP = {
  layouts.PROMPT: jnp.array([True, False, True, False]),
  layouts.SOURCE: jnp.array([True, True, False, False]),
}


def _build(layout, text_length, keep, multiple=4):
  """Sequences of captions 5 6 7 and codes 0 3."""
  B = len(text_length)
  text = jnp.broadcast_to(jnp.array([5, 6, 7]), (B, 3))
  codes = jnp.broadcast_to(jnp.array([0, 3]), (B, 2))
  return layouts.build(layout, VOCABULARY, text, text_length, codes, keep, multiple)


def _mask(regions) -> np.ndarray:
  sequence = concatenate([region.visibility for region in regions.values()])
  return np.asarray(visible(sequence, sequence)).astype(int)


def _docstring_mask(function) -> np.ndarray:
  lines = re.findall(r'^ +\w+((?: +[01])+)$', function.__doc__, re.MULTILINE)
  return np.array([line.split() for line in lines], int)


@pytest.mark.parametrize('name', GOLDEN)
def test_arrays_equal_the_golden_ones_with_every_combination_of_conditions(name):
  golden = GOLDEN[name]
  keep = {condition: jnp.array(values) for condition, values in golden['keep'].items()}
  if name == 'diffusion_sequence':  # recorded when its condition was called `prompt`
    keep = {layouts.VISUAL_PROMPT: keep.pop(layouts.PROMPT)}
  regions = _build(LAYOUTS[name], jnp.array(golden['text_length']), keep)
  assert list(regions) == list(golden['regions'])
  for expert, region in regions.items():
    expected = {field: np.array(rows) for field, rows in golden['regions'][expert].items()}
    # A golden target means something only where it has weight.
    expected['targets'] *= expected['weights']
    for field in ('ids', 'positions', 'targets', 'weights'):
      np.testing.assert_array_equal(getattr(region, field), expected[field], field)
    for field in ('order', 'since', 'reach', 'until'):
      np.testing.assert_array_equal(getattr(region.visibility, field), expected[field], field)


def test_one_array_drops_every_condition():
  keep = jnp.array([True, False])
  both = {layouts.PROMPT: keep, layouts.SOURCE: keep}
  lengths = jnp.array([2, 3])
  from_array, from_dict = (_mask(_build(LAYOUTS['edit'], lengths, k)) for k in (keep, both))
  np.testing.assert_array_equal(from_array, from_dict)


def test_ids_of_text_and_codes_are_joint():
  region = _build(LAYOUTS['text_to_image'], jnp.array([2]), ALL[:1], 1)['ar']
  np.testing.assert_array_equal(region.ids[0], [1, 5, 6, 7, 14, 10, 13, 15, 2])
  # [bot] predicts the first code, the last code predicts [eot].
  np.testing.assert_array_equal(region.targets[0], [0, 0, 0, 0, 10, 13, 15, 0, 0])


def test_the_diffusion_sequence_has_the_mask_of_its_docstring():
  regions = _build(LAYOUTS['diffusion_sequence'], jnp.array([3, 3]), jnp.array([True, False]))
  assert [region.ids.shape[1] for region in regions.values()] == [4, 4]
  present = np.array([0, 1, 2, 4, 5, 6])  # Each region is padded by one.
  expected = _docstring_mask(layouts.diffusion_sequence)
  whole, dropped = _mask(regions)
  np.testing.assert_array_equal(whole[present][:, present], expected)
  np.testing.assert_array_equal(dropped[present][:, present], expected * (present > 1))
  assert whole.sum() == expected.sum() and dropped.sum() == expected[:, 2:].sum()


def test_an_edit_has_the_mask_of_its_docstring():
  token = jnp.ones((1, 1), jnp.int32)
  args = (VOCABULARY, token, jnp.array([1]), token, ALL[:1])
  expected = _docstring_mask(layouts.edit)
  assert expected.shape == (14, 14)
  mask = _mask(layouts.build(layouts.edit(VOCABULARY, 1, 1, 2), *args))
  np.testing.assert_array_equal(mask[0], expected)


def _tokens(layout, keep) -> list[list[tuple]]:
  """Present tokens of four sequences: (span, id, position)."""
  regions = _build(layout, jnp.full((4,), 2), keep)
  sequences = []
  for element in range(4):
    tokens = []
    for expert, region in regions.items():
      names = [s.name for s in layout.spans if s.expert == expert for _ in range(s.length)]
      for slot, name in enumerate(names):
        if region.visibility.until[element, slot]:
          tokens.append(
            (name, int(region.ids[element, slot]), int(region.positions[element, slot]))
          )
      assert not region.visibility.until[element, len(names) :].any()
    sequences.append(tokens)
  return sequences


def _numbered(*tokens) -> list[tuple]:
  return [(name, token, position) for position, (name, token) in enumerate(tokens)]


_BOS, _BOI = [('bos', 1)], [('boi', 2)]
_SOURCE = [
  ('source_boi', 2),
  ('source_time', 0),
  ('source_latents', 0),
  ('source_latents', 0),
  ('eoi', 3),
]
_TEXT = [('text', 5), ('text', 6)]
_PROMPT = [('bot', 14), ('codes', 10), ('codes', 13), ('eot', 15)]
_IMAGE = [('time', 0), ('latents', 0), ('latents', 0)]


def test_the_four_sequences_of_internal_edits_are_those_of_appendix_d():
  """Full, no text, no source, null, token by token; the tail `[eoi] [eos]` is left out."""
  assert _tokens(LAYOUTS['edit'], KEEP) == [
    _numbered(*_BOS, *_SOURCE, *_TEXT, *_PROMPT, *_BOI, *_IMAGE),
    _numbered(*_BOS, *_SOURCE, *_BOI, *_IMAGE),
    _numbered(*_BOS, *_TEXT, *_PROMPT, *_BOI, *_IMAGE),
    _numbered(*_BOS, *_BOI, *_IMAGE),
  ]


def test_the_three_sequences_of_external_edits_are_those_of_appendix_d():
  assert _tokens(LAYOUTS['edit_ar_sequence'], KEEP)[:3] == [
    _numbered(*_BOS, *_SOURCE, *_TEXT, *_PROMPT),
    _numbered(*_BOS, *_SOURCE, *_PROMPT),
    _numbered(*_BOS, *_TEXT, *_PROMPT),
  ]


def test_edits_without_source_image_are_text_to_image():
  keep = {**KEEP, layouts.SOURCE: ~ALL}
  ours, theirs = (
    _build(LAYOUTS[name], jnp.full((4,), 2), keep) for name in ('edit', 'text_to_image')
  )
  our_present, their_present = (
    np.asarray(concatenate([r.visibility for r in regions.values()]).until > 0)
    for regions in (ours, theirs)
  )
  for our_mask, our_slots, their_mask, their_slots in zip(
    _mask(ours), our_present, _mask(theirs), their_present, strict=True
  ):
    np.testing.assert_array_equal(
      our_mask[our_slots][:, our_slots], their_mask[their_slots][:, their_slots]
    )


def test_without_codes_the_sequence_is_show_o2s():
  names = [span.name for span in LAYOUTS['text_to_image_without_codes'].spans]
  assert names == ['bos', 'text', 'boi', 'time', 'latents']


def test_a_source_image_adds_1027_tokens_at_paper_size():
  count = lambda layout: sum(span.length for span in layout.spans)
  sizes = (VOCABULARY, 249, 576, 1024)
  edit = count(layouts.edit(*sizes))
  assert edit - count(layouts.text_to_image(*sizes)) == 1027
  # The paper counts [eoi] [eos] too, which no token sees: 2,883.
  assert edit + 2 == 2883
