"""Cached prefixes: stacked and repeated along the batch axis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.sampling.prefix import Prefix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Layers:
  """A cache whose layer axis precedes the batch axis."""

  k: jax.Array

  def map_batch(self, change, *others):
    return _Layers(change(self.k, *(other.k for other in others), 1))


def _prefix(batch, seed):
  numpy_rng = np.random.default_rng(seed)
  leaf = lambda *shape: jnp.asarray(numpy_rng.standard_normal(shape), jnp.float32)
  cache = {'layers': _Layers(leaf(5, batch, 2)), 'memory': None}
  return Prefix(cache, (leaf(batch, 3), leaf(batch)))


def test_branches_are_stacked_along_the_batch_axis_of_each_leaf():
  parts = [_prefix(batch, seed) for seed, batch in enumerate((2, 2, 1))]
  joined = Prefix.stack(parts)
  assert joined.cache['layers'].k.shape == (5, 5, 2) and joined.state[0].shape == (5, 3)
  np.testing.assert_array_equal(joined.cache['layers'].k[:, 2:4], parts[1].cache['layers'].k)
  np.testing.assert_array_equal(joined.state[1][4:], parts[2].state[1])
  jax.tree.map(np.testing.assert_array_equal, joined.first(2), parts[0])
  assert Prefix.stack(parts[:1]) is parts[0]


def test_one_element_is_repeated_for_a_batch():
  single = _prefix(1, 3)
  repeated = single.repeat(3)
  jax.tree.map(np.testing.assert_array_equal, repeated, Prefix.stack([single] * 3))
