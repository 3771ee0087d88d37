"""Token filters, draws and cached decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.sampling import decoding
from vpe_jax.sampling.settings import TokenSampling

PLAIN = TokenSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
LOGITS = jnp.log(jnp.asarray([0.05, 0.4, 0.3, 0.2, 0.05]))


def _kept(**settings):
  return np.flatnonzero(np.isfinite(decoding.filter_logits(LOGITS, **settings))).tolist()


@pytest.mark.parametrize(
  'settings, kept',
  [
    ({}, [0, 1, 2, 3, 4]),
    ({'temperature': 0.0}, [1]),
    ({'top_k': 1}, [1]),
    ({'top_k': 3}, [1, 2, 3]),
    ({'top_k': 4}, [0, 1, 2, 3, 4]),  # both tokens of 0.05 tie for the fourth place
    ({'top_k': 50}, [0, 1, 2, 3, 4]),
    ({'top_p': 1e-9}, [1]),
    ({'top_p': 0.39}, [1]),
    ({'top_p': 0.41}, [1, 2]),
    ({'top_p': 0.71}, [1, 2, 3]),
    ({'min_p': 1.0}, [1]),
    ({'min_p': 0.7}, [1, 2]),
    ({'min_p': 0.3}, [1, 2, 3]),
    ({'min_p': 0.1}, [0, 1, 2, 3, 4]),
    ({'top_k': 2, 'top_p': 0.5}, [1]),  # top_p sees 4/7 and 3/7
    ({'temperature': 1e-3, 'top_p': 0.99}, [1]),
    ({'temperature': 100.0, 'min_p': 0.9}, [0, 1, 2, 3, 4]),
  ],
)
def test_filters_keep_what_they_say(settings, kept):
  assert _kept(**settings) == kept


def test_filter_leaves_the_scaled_logits_of_what_it_keeps():
  filtered = decoding.filter_logits(LOGITS.astype(jnp.bfloat16), temperature=0.5, top_k=2)
  assert filtered.dtype == jnp.float32
  expected = np.asarray(LOGITS.astype(jnp.bfloat16), np.float32)[[1, 2]] / 0.5
  np.testing.assert_allclose(filtered[jnp.asarray([1, 2])], expected)


def test_filters_agree_with_a_plain_implementation():
  rows = np.asarray(jax.random.normal(jax.random.key(0), (20, 64)) * 3)
  ours = np.isfinite(decoding.filter_logits(jnp.asarray(rows), 0.8, 30, 0.9, 0.05))
  for row, kept in zip(rows / 0.8, ours):
    places = np.argsort(-row)[:30]
    share = np.exp(row[places]) / np.exp(row[places]).sum()
    places = places[: int(np.searchsorted(np.cumsum(share), 0.9)) + 1]
    places = [p for p in places if np.exp(row[p]) >= 0.05 * np.exp(row.max())]
    assert set(places) == set(np.flatnonzero(kept))


def test_greedy_takes_the_first_of_equals():
  logits = jnp.asarray([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]])
  greedy = dataclasses.replace(PLAIN, temperature=0.0)
  keys = jax.random.split(jax.random.key(0), 2)
  assert decoding.sample_tokens(keys, logits, greedy).tolist() == [1, 0]


def test_draws_follow_the_filtered_distribution():
  count = 20_000
  settings = dataclasses.replace(PLAIN, min_p=0.3)  # leaves 4/9, 3/9, 2/9
  keys = jax.random.split(jax.random.key(3), count)
  drawn = decoding.sample_tokens(keys, jnp.tile(LOGITS, (count, 1)), settings)
  share = np.bincount(drawn, minlength=5) / count
  expected = np.asarray([0, 4, 3, 2, 0]) / 9
  deviation = np.sqrt(expected * (1 - expected) / count)
  assert (np.abs(share - expected) <= 4 * deviation).all()


def test_temperature_flattens():
  count = 20_000
  keys = jax.random.split(jax.random.key(4), count)
  settings = dataclasses.replace(PLAIN, temperature=2.0)
  drawn = decoding.sample_tokens(keys, jnp.tile(LOGITS, (count, 1)), settings)
  expected = np.sqrt(np.exp(LOGITS)) / np.sqrt(np.exp(LOGITS)).sum()
  deviation = np.sqrt(expected * (1 - expected) / count)
  assert (np.abs(np.bincount(drawn, minlength=5) / count - expected) <= 4 * deviation).all()


def test_a_row_does_not_depend_on_its_neighbours():
  keys = jax.random.split(jax.random.key(5), 8)
  logits = jax.random.normal(jax.random.key(6), (8, 50))
  together = decoding.sample_tokens(keys, logits, PLAIN)
  order = jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
  np.testing.assert_array_equal(
    decoding.sample_tokens(keys[order], logits[order], PLAIN), together[order]
  )
  assert decoding.sample_tokens(keys[2:3], logits[2:3], PLAIN)[0] == together[2]


@pytest.mark.parametrize(
  'settings',
  [
    {'temperature': -1.0},
    {'temperature': float('nan')},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 1.5},
    {'min_p': -0.1},
    {'min_p': 1.1},
  ],
)
def test_settings_out_of_range_are_refused(settings):
  with pytest.raises(UserError, match=next(iter(settings))):
    decoding.filter_logits(LOGITS, **settings)


def _counting_step(cache, tokens, index):
  """A model whose next code is the last plus 1 (mod 10); its cache records what it was fed."""
  fed = jax.lax.dynamic_update_slice(cache, tokens[:, None], (0, index))
  return jax.nn.one_hot((tokens - 100 + 1) % 10, 10) * 50, fed


def test_decode_feeds_every_code_with_its_place_and_offset():
  first = jax.nn.one_hot(jnp.asarray([3, 8]), 10) * 50
  keys = jax.random.split(jax.random.key(0), 2)
  codes, cache = jax.jit(
    lambda keys: decoding.decode(
      _counting_step, jnp.zeros((2, 6), jnp.int32), first, 6, keys, PLAIN, offset=100
    )
  )(keys)
  np.testing.assert_array_equal(codes, [[3, 4, 5, 6, 7, 8], [8, 9, 0, 1, 2, 3]])
  np.testing.assert_array_equal(cache, codes + 100)
  assert codes.dtype == jnp.int32


def _flat(cache, tokens, index):
  return jnp.zeros((tokens.shape[0], 1000)), cache


def test_decode_draws_anew_at_each_place_and_row():
  keys = jax.random.split(jax.random.key(1), 4)
  codes, _ = decoding.decode(_flat, (), jnp.zeros((4, 1000)), 16, keys, PLAIN)
  assert len(np.unique(codes)) > 55  # 64 draws of 1,000: two collisions expected
  alone, _ = decoding.decode(_flat, (), jnp.zeros((1, 1000)), 16, keys[2:3], PLAIN)
  np.testing.assert_array_equal(alone[0], codes[2])
  longer, _ = decoding.decode(_flat, (), jnp.zeros((4, 1000)), 20, keys, PLAIN)
  np.testing.assert_array_equal(longer[:, :16], codes)


def test_likelihood_is_of_the_whole_distribution():
  logits = jnp.tile(LOGITS, (2, 3, 1)) + 7.0
  codes = jnp.asarray([[1, 1, 0], [3, 2, 4]])
  expected = np.log([[0.4, 0.4, 0.05], [0.2, 0.3, 0.05]]).mean(1)
  np.testing.assert_allclose(decoding.log_likelihood(logits, codes), expected, rtol=1e-6)
