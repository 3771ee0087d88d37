"""Packing: budgets, masks, and attention equal to that of separate samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError, concatenate
from vpe_jax.ops.attention import reference
from vpe_jax.sequence import packing
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import teacher_forced_frames
from vpe_jax.sequence.spans import Layout, Span

LAYOUT = Layout(
  (
    Span('bos', 1, 'ar', id=1),
    Span('text', 4, 'ar', predicts=True, condition='prompt'),
    Span('boi', 1, 'ar', id=2),
    Span('image', 3, 'dit', full=True),
    Span('eoi', 1, 'ar', id=3),
  )
)


def _samples(multiple=1):
  """Five samples: one without text, one whose prompt is dropped; images of 1 to 3 tokens."""
  text = jnp.arange(10, 30).reshape(5, 4)
  lengths = {'text': jnp.array([2, 4, 0, 4, 1]), 'image': jnp.array([3, 1, 2, 3, 3])}
  keep = jnp.array([True, True, True, False, True])
  return build(LAYOUT, {'text': text}, lengths, keep, multiple)


def test_first_fit_in_order_with_one_budget_per_expert():
  lengths = {'ar': np.array([4, 3, 5, 2, 1]), 'dit': np.array([1, 3, 1, 1, 2])}
  # Sample 1 fits the tokens of sequence 0, but not its image; sample 3 fills it up.
  assert packing.assign(lengths, {'ar': 7, 'dit': 3}) == [[0, 3], [1], [2, 4]]
  assert packing.assign(lengths, {'ar': 15, 'dit': 8}) == [[0, 1, 2, 3, 4]]


def test_a_sample_above_a_budget_is_an_error():
  lengths = {'ar': np.array([4, 9]), 'dit': np.array([1, 1])}
  with pytest.raises(UserError, match='sample 1 has 9 ar .* 8'):
    packing.assign(lengths, {'ar': 8, 'dit': 8})
  with pytest.raises(ValueError, match='dit'):
    packing.assign(lengths, {'ar': 9})
  with pytest.raises(ValueError, match='budget of 7'):
    packing.pack(_samples(), [[0, 1]], {'ar': 7, 'dit': 8})


def test_mask_is_that_of_the_docstring(masks):
  layout = Layout((Span('text', 2, 'text'), Span('image', 2, 'image', full=True)))
  lengths = {'text': jnp.array([1, 2]), 'image': jnp.array([2, 1])}
  packed, _ = packing.pack(build(layout, lengths=lengths), [[0, 1]], {'text': 4, 'image': 4})
  np.testing.assert_array_equal(masks.of(packed)[0], masks.parse(packing.pack.__doc__))


def test_packed_tokens_equal_those_of_the_samples():
  regions, budgets = _samples(multiple=4), {'ar': 12, 'dit': 6}
  bins = packing.assign(packing.token_counts(regions), budgets)
  assert bins == [[0, 1], [2, 3], [4]]
  packed, sources = packing.pack(regions, [*bins, []], budgets)
  for expert, budget in budgets.items():
    region, source = packed[expert], sources[expert]
    assert all(leaf.shape == (4, budget) for leaf in jax.tree.leaves(region))
    for index, samples in enumerate(bins):
      sample_ids, used = source.sample[index], 0
      for sample in samples:
        slots = np.flatnonzero(np.asarray(regions[expert].visibility.until[sample]))
        span = slice(used, used := used + len(slots))
        assert (sample_ids[span] == sample).all() and (source.slot[index, span] == slots).all()
        for name in ('ids', 'positions', 'targets', 'weights'):
          expected = np.asarray(getattr(regions[expert], name))[sample, slots]
          np.testing.assert_array_equal(getattr(region, name)[index, span], expected)
      assert (sample_ids[used:] == -1).all()
      assert not any(leaf[index, used:].any() for leaf in jax.tree.leaves(region))
    assert not any(leaf[3].any() for leaf in jax.tree.leaves(region))


def _attention(q, k, v, regions):
  sequence = concatenate([region.visibility for region in regions.values()])
  sequence = jax.tree.map(jnp.asarray, sequence)
  return reference.attention(q, k, v, sequence, sequence)[0]


@pytest.mark.parametrize('case', ['text and image', 'frames'])
def test_attention_of_packed_samples_equals_that_of_separate_ones(case):
  if case == 'frames':  # Their `until` is finite.
    layout = teacher_forced_frames(2, 2, 2)
    regions = build(layout, lengths={'frame0/text': jnp.array([2, 1, 0, 2, 1])})
    budgets = {'text': 8, 'image': 18}
  else:
    regions, budgets = _samples(), {'ar': 12, 'dit': 6}
  normal = lambda key, region: jax.random.normal(jax.random.key(key), (*region.ids.shape, 2, 8))
  separate = [{name: normal(i, r) for name, r in regions.items()} for i in range(3)]
  unpacked = _attention(*(jnp.concatenate(list(x.values()), 1) for x in separate), regions)

  bins = packing.assign(packing.token_counts(regions), budgets)
  assert max(map(len, bins)) > 1 and len(bins) > 1
  packed, sources = packing.pack(regions, bins, budgets)
  gathered = jax.jit(packing.gather)
  inputs = [
    jnp.concatenate([gathered(x[name], sources[name]) for name in regions], 1) for x in separate
  ]
  outputs = _attention(*inputs, packed)
  offset = 0
  for name, region in regions.items():
    L, budget = region.ids.shape[1], budgets[name]
    start = sum(budgets[other] for other in list(budgets)[: list(budgets).index(name)])
    expected = packing.gather(np.asarray(unpacked[:, offset : offset + L]), sources[name])
    np.testing.assert_allclose(outputs[:, start : start + budget], expected, atol=1e-6)
    offset += L
