"""Token filters, sampling of tokens, and cached autoregressive decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.sampling import autoregressive
from vpe_jax.sampling.guidance import UNGUIDED, Guidance
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sampling.settings import TokenSampling

PLAIN = TokenSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
LOGITS = jnp.log(jnp.asarray([0.05, 0.4, 0.3, 0.2, 0.05]))


def _kept_tokens(**settings):
  return np.flatnonzero(np.isfinite(autoregressive.filter_logits(LOGITS, **settings))).tolist()


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
def test_filters_keep_the_expected_tokens(settings, kept):
  assert _kept_tokens(**settings) == kept


def test_filter_keeps_the_scaled_logits():
  filtered = autoregressive.filter_logits(LOGITS.astype(jnp.bfloat16), temperature=0.5, top_k=2)
  assert filtered.dtype == jnp.float32
  expected = np.asarray(LOGITS.astype(jnp.bfloat16), np.float32)[[1, 2]] / 0.5
  np.testing.assert_allclose(filtered[jnp.asarray([1, 2])], expected)


def test_filters_agree_with_a_plain_implementation():
  logits = np.asarray(jax.random.normal(jax.random.key(0), (20, 64)) * 3)
  ours = np.isfinite(autoregressive.filter_logits(jnp.asarray(logits), 0.8, 30, 0.9, 0.05))
  for element, kept in zip(logits / 0.8, ours):
    tokens = np.argsort(-element)[:30]
    share = np.exp(element[tokens]) / np.exp(element[tokens]).sum()
    tokens = tokens[: int(np.searchsorted(np.cumsum(share), 0.9)) + 1]
    tokens = [t for t in tokens if np.exp(element[t]) >= 0.05 * np.exp(element.max())]
    assert set(tokens) == set(np.flatnonzero(kept))


def test_greedy_takes_the_first_of_equals():
  logits = jnp.asarray([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]])
  greedy = dataclasses.replace(PLAIN, temperature=0.0)
  keys = jax.random.split(jax.random.key(0), 2)
  assert autoregressive.sample_tokens(keys, logits, greedy).tolist() == [1, 0]


def test_samples_follow_the_filtered_distribution():
  count = 20_000
  settings = dataclasses.replace(PLAIN, min_p=0.3)  # leaves 4/9, 3/9, 2/9
  keys = jax.random.split(jax.random.key(3), count)
  tokens = autoregressive.sample_tokens(keys, jnp.tile(LOGITS, (count, 1)), settings)
  share = np.bincount(tokens, minlength=5) / count
  expected = np.asarray([0, 4, 3, 2, 0]) / 9
  deviation = np.sqrt(expected * (1 - expected) / count)
  assert (np.abs(share - expected) <= 4 * deviation).all()


def test_temperature_flattens_the_distribution():
  count = 20_000
  keys = jax.random.split(jax.random.key(4), count)
  settings = dataclasses.replace(PLAIN, temperature=2.0)
  tokens = autoregressive.sample_tokens(keys, jnp.tile(LOGITS, (count, 1)), settings)
  expected = np.sqrt(np.exp(LOGITS)) / np.sqrt(np.exp(LOGITS)).sum()
  deviation = np.sqrt(expected * (1 - expected) / count)
  assert (np.abs(np.bincount(tokens, minlength=5) / count - expected) <= 4 * deviation).all()


def test_samples_do_not_depend_on_their_batch():
  keys = jax.random.split(jax.random.key(5), 8)
  logits = jax.random.normal(jax.random.key(6), (8, 50))
  together = autoregressive.sample_tokens(keys, logits, PLAIN)
  order = jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
  np.testing.assert_array_equal(
    autoregressive.sample_tokens(keys[order], logits[order], PLAIN), together[order]
  )
  assert autoregressive.sample_tokens(keys[2:3], logits[2:3], PLAIN)[0] == together[2]


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
    autoregressive.filter_logits(LOGITS, **settings)


def _counting(prefix, tokens, index):
  """A network whose next code is the last plus 1 (mod 10); its cache records what it was fed."""
  cache = jax.lax.dynamic_update_slice(prefix.cache, tokens[:, None], (0, index))
  return Prefix(cache, (tokens + 1) % 10)


def _sample_code(keys, state, index):
  del keys, index
  return state


def _counted(first, length, **settings):
  count = len(first)
  prefix = Prefix(jnp.full((count, length), -1, jnp.int32), jnp.asarray(first, jnp.int32))
  keys = jax.random.split(jax.random.key(0), count)
  run = lambda keys: autoregressive.generate(
    _counting, prefix, length, keys, _sample_code, **settings
  )
  return jax.jit(run)(keys)


def test_every_token_is_fed_at_its_index():
  codes, prefix = _counted([3, 8], 6)
  np.testing.assert_array_equal(codes, [[3, 4, 5, 6, 7, 8], [8, 9, 0, 1, 2, 3]])
  np.testing.assert_array_equal(prefix.cache, codes)
  np.testing.assert_array_equal(prefix.state, [9, 4])
  assert codes.dtype == jnp.int32


def test_text_ends_at_an_end_token_and_is_padded():
  stop = autoregressive.Stop(ends=(7, 9), pad=-3)
  tokens, prefix = _counted([3, 8, 0], 12, stop=stop)
  expected = np.full((3, 12), -3)
  expected[0, :5], expected[1, :2], expected[2, :8] = range(3, 8), (8, 9), range(8)
  np.testing.assert_array_equal(tokens, expected)
  # Nothing is computed after the last end.
  np.testing.assert_array_equal(prefix.cache[2], [*range(8), -1, -1, -1, -1])
  cut, _ = _counted([3, 8, 0], 4, stop=stop)
  np.testing.assert_array_equal(cut, expected[:, :4])


TABLE = 3.0 * jax.random.normal(jax.random.key(8), (2, 40, 40))  # next-token logits of two branches


def _recurrent(prefix, tokens, index):
  """A network of two branches whose logits depend on all tokens: the sum of their table entries."""
  entries = jnp.concatenate([table[branch] for table, branch in zip(TABLE, jnp.split(tokens, 2))])
  return Prefix(prefix.cache + entries / (1.0 + index), prefix.cache + entries)


@pytest.mark.parametrize('scale', [0.0, 1.0, 2.5])
def test_cached_tokens_are_the_likeliest_of_uncached_guided_logits(scale):
  guidance = Guidance.classifier_free(scale)
  branches = Guidance.classifier_free(2.0).branches
  start = jax.random.normal(jax.random.key(9), (6, 40))
  greedy = dataclasses.replace(PLAIN, temperature=0.0)
  sample = autoregressive.categorical(lambda state: state, greedy, guidance, branches)
  keys = jax.random.split(jax.random.key(0), 3)
  codes, _ = jax.jit(
    lambda start: autoregressive.generate(_recurrent, Prefix(start, start), 7, keys, sample, 2)
  )(start)
  cache = logits = np.asarray(start)
  for i in range(7):
    conditional, unconditional = np.split(logits, 2)
    guided = unconditional + scale * (conditional - unconditional)
    np.testing.assert_array_equal(codes[:, i], guided.argmax(-1))
    entries = np.concatenate([table[codes[:, i]] for table in np.asarray(TABLE)])
    cache, logits = cache + entries / (1.0 + i), cache + entries


def test_guidance_may_decrease_over_the_tokens():
  conditional, unconditional = jnp.asarray([[0.0, 1.0]]), jnp.asarray([[1.25, 0.0]])
  # Guided logits of token 0: 1.25 (1 - s), of token 1: s. They cross at s = 5 / 9.
  guidance = Guidance.classifier_free(-1.0, schedule='linear')
  greedy = dataclasses.replace(PLAIN, temperature=0.0)
  sample = autoregressive.categorical(lambda state: state, greedy, guidance, guidance.branches, 10)
  keys = jax.random.split(jax.random.key(0), 1)
  feed = lambda prefix, tokens, index: prefix
  prefix = Prefix((), jnp.concatenate([conditional, unconditional]))
  codes, _ = autoregressive.generate(feed, prefix, 10, keys, sample, 2)
  scales = 1 + (-1 - 1) * (10 - np.arange(10)) / 10
  np.testing.assert_array_equal(codes[0], scales > 5 / 9)


def test_blocks_of_different_vocabularies_follow_one_another():
  """Each block reads its own logits from the state, and starts where the previous one ended."""
  heads = jax.random.normal(jax.random.key(10), (2, 8, 12))
  embed = jax.random.normal(jax.random.key(11), (2, 12, 8))
  keys = jax.random.split(jax.random.key(0), 3)
  greedy = dataclasses.replace(PLAIN, temperature=0.0)

  def block(prefix, index, length):
    feed = lambda p, tokens, i: Prefix(p.cache + 1, jnp.tanh(p.state + embed[index][tokens]))
    logits = lambda state: state @ heads[index]
    sample = autoregressive.categorical(logits, greedy, UNGUIDED, UNGUIDED.branches)
    return autoregressive.generate(feed, prefix, length, keys, sample)

  state = jax.random.normal(jax.random.key(12), (3, 8))
  codes, prefix = block(Prefix(jnp.zeros(3, jnp.int32), state), 0, 4)
  image, prefix = block(prefix, 1, 5)
  np.testing.assert_array_equal(prefix.cache, [9, 9, 9])
  for index, tokens in enumerate((codes, image)):
    for i in range(tokens.shape[1]):
      np.testing.assert_array_equal(tokens[:, i], jnp.argmax(state @ heads[index], -1))
      state = jnp.tanh(state + embed[index][tokens[:, i]])


def test_tokens_may_be_groups_of_vectors():
  """As with a flow head: each hidden state yields two vectors, shared by all branches."""

  def sample(keys, state, index):
    conditional, unconditional = jnp.split(state, 2)
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, 5)))(keys)
    return (2 * conditional - unconditional)[:, None] + noise

  feed = lambda prefix, tokens, index: Prefix((), prefix.state + tokens.sum(1))
  state = jax.random.normal(jax.random.key(13), (6, 5))
  keys = jax.random.split(jax.random.key(14), 3)
  tokens, prefix = autoregressive.generate(feed, Prefix((), state), 4, keys, sample, 2)
  assert tokens.shape == (3, 4, 2, 5)
  expected = state + jnp.tile(tokens.sum((1, 2)), (2, 1))
  np.testing.assert_allclose(prefix.state, expected, rtol=1e-5, atol=1e-5)


def test_each_position_and_batch_element_has_its_own_randomness():
  feed = lambda prefix, tokens, index: prefix
  sample = autoregressive.categorical(lambda state: state, PLAIN, UNGUIDED, UNGUIDED.branches)
  run = lambda length, keys: autoregressive.generate(
    feed, Prefix((), jnp.zeros((len(keys), 1000))), length, keys, sample
  )[0]
  keys = jax.random.split(jax.random.key(1), 4)
  codes = run(16, keys)
  assert len(np.unique(codes)) > 55  # 64 samples of 1,000: two collisions expected
  np.testing.assert_array_equal(run(16, keys[2:3])[0], codes[2])
  np.testing.assert_array_equal(run(20, keys)[:, :16], codes)


def test_likelihood_is_normalized_over_all_tokens():
  logits = jnp.tile(LOGITS, (2, 3, 1)) + 7.0
  codes = jnp.asarray([[1, 1, 0], [3, 2, 4]])
  expected = np.log([[0.4, 0.4, 0.05], [0.2, 0.3, 0.05]]).mean(1)
  np.testing.assert_allclose(autoregressive.log_likelihood(logits, codes), expected, rtol=1e-6)
