"""Tests of the optimizers against optax's own, and of learning rates and multipliers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpe_jax import config as config_lib
from vpe_jax import sharding
from vpe_jax.config import MeshConfig, OptimConfig
from vpe_jax.contracts import UserError
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import optimizer

AXES = (
  ('q/kernel', ('layers', 'embed', 'heads', 'head')),
  ('mlp/kernel', ('embed', 'mlp')),
  ('window/kernel', ('kernel', 'kernel', 'conv_in', 'conv_out')),
  ('embed/table', ('vocab', 'embed')),
  ('norm/scale', ('layers', 'embed')),
  ('bias', ('mlp',)),
)
SHAPES = {
  'q/kernel': (3, 256, 4, 32),
  'mlp/kernel': (128, 384),
  'window/kernel': (2, 2, 32, 128),
  'embed/table': (160, 128),
  'norm/scale': (3, 256),
  'mlp/bias': (384,),
}


def _leaves(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  return {'kernel': jax.random.normal(keys[0], (3, 4)), 'bias': jax.random.normal(keys[1], (4,))}


def _tree(seed):
  """Parameters or gradients of a small network, nested."""
  keys = jax.random.split(jax.random.key(seed), len(SHAPES))
  return optimizer.convert.tree(
    {path: jax.random.normal(key, shape) for key, (path, shape) in zip(keys, SHAPES.items())}
  )


def _size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _run(config, steps=3, params=None, axes=AXES):
  """Parameters and optimizer state after some steps."""
  params = _tree(0) if params is None else params
  state = optimizer.init(params, config, axes)
  update = jax.jit(lambda *arrays: optimizer.update(*arrays, config, axes))
  for step in range(steps):
    params, state = update(_tree(step + 1), state, params, jnp.int32(step))
  return params, state


def _optax_run(rule, params, steps=3):
  """The parameters after some steps of an optax optimizer; `params` is a subset of `_tree`."""
  state = rule.init(params)

  @jax.jit
  def update(gradient, state, params):
    change, state = rule.update(gradient, state, params)
    return optax.apply_updates(params, change), state

  for step in range(steps):
    gradient = {path: leaves_by_path(_tree(step + 1))[path] for path in params}
    params, state = update(gradient, state, params)
  return params


class TestAdamW:
  def test_equals_optax_with_warm_up_and_clipping(self):
    config = OptimConfig(lr=3e-2, warmup=3, b1=0.8, b2=0.95, eps=0.1, clip=0.5, weight_decay=0.1)
    rate = lambda count: 3e-2 * min((count + 1) / 3, 1)
    params = _leaves(0)
    ours, state = params, optimizer.init(params)
    theirs, their_state = params, None
    for step in range(5):
      gradient = jax.tree.map(lambda leaf: leaf * 2, _leaves(step + 1))
      clipped = optimizer.clip(gradient, optax.global_norm(gradient), config.clip)
      ours, state = optimizer.update(clipped, state, ours, jnp.int32(step), config)
      chain = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
          rate(step), 0.8, 0.95, 0.1, weight_decay=0.1, mask={'kernel': True, 'bias': False}
        ),
      )
      their_state = chain.init(theirs) if their_state is None else their_state
      change, their_state = chain.update(gradient, their_state, theirs)
      theirs = optax.apply_updates(theirs, change)
    for name in params:
      np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    assert int(state['count']) == 5

  def test_state_has_two_moments_and_a_count(self):
    params = _tree(0)
    state = optimizer.init(params, OptimConfig(mu_dtype='bfloat16'), AXES)
    assert state.keys() == {'count', 'mu', 'nu'}
    assert (
      leaves_by_path(state['mu']).keys()
      == leaves_by_path(state['nu']).keys()
      == leaves_by_path(params).keys()
    )
    assert _size(state) == 2 * _size(params) + 1

  def test_first_moments_may_be_bfloat16(self):
    params, state = _run(OptimConfig(warmup=0, mu_dtype='bfloat16'))
    exact, _ = _run(OptimConfig(warmup=0))
    dtypes = lambda name: {leaf.dtype for leaf in jax.tree.leaves(state[name])}
    assert dtypes('mu') == {jnp.dtype('bfloat16')} and dtypes('nu') == {jnp.dtype('float32')}
    gap = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), params, exact)
    assert 0 < max(jax.tree.leaves(gap)) < 1e-4  # three steps of 1e-3


class TestAdafactor:
  CONFIG = OptimConfig(name='adafactor', lr=1e-2, warmup=0)

  def test_equals_optax_on_two_dimensional_leaves(self):
    ours = leaves_by_path(_run(self.CONFIG)[0])
    paths = ('mlp/kernel', 'embed/table', 'mlp/bias')
    theirs = _optax_run(
      optax.adafactor(1e-2), {path: leaves_by_path(_tree(0))[path] for path in paths}
    )
    for path in paths:
      np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-7)

  def test_stacked_layers_train_like_separate_leaves(self):
    ours = leaves_by_path(_run(self.CONFIG)[0])
    for path, shape in (('q/kernel', (256, 128)), ('norm/scale', (256,))):
      for layer in range(3):
        rule, params = optax.adafactor(1e-2), leaves_by_path(_tree(0))[path][layer].reshape(shape)
        state = rule.init(params)
        for step in range(3):
          gradient = leaves_by_path(_tree(step + 1))[path][layer].reshape(shape)
          change, state = rule.update(gradient, state, params)
          params = params + change
        trained = ours[path][layer].reshape(shape)
        np.testing.assert_allclose(trained, params, rtol=1e-5, atol=1e-7)

  def test_state_has_row_and_column_factors(self):
    _, state = _run(self.CONFIG)
    assert state.keys() == {'count', 'v_row', 'v_col', 'v'} and int(state['count']) == 3
    rows, columns = leaves_by_path(state['v_row']), leaves_by_path(state['v_col'])
    assert {path: (leaf.shape, columns[path].shape) for path, leaf in rows.items()} == {
      'q/kernel': ((3, 128), (3, 256)),
      'mlp/kernel': ((128,), (384,)),
      'window/kernel': ((128,), (128,)),
      'embed/table': ((128,), (160,)),
    }
    assert leaves_by_path(state['v']).keys() == {'norm/scale', 'mlp/bias'}

  def test_factored_state_is_sharded_by_logical_axes(self):
    params = _tree(0)
    state = optimizer.init(params, self.CONFIG, AXES)
    axes = optimizer.logical_axes(params, AXES)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2, strategy='fsdp_tensor'))
    shardings = leaves_by_path(sharding.param_shardings(state, axes, mesh, 'fsdp_tensor'))
    leaves = leaves_by_path(state)
    shapes = {path: shardings[path].shard_shape(leaf.shape) for path, leaf in leaves.items()}
    assert shapes['v_row/q/kernel'] == (3, 16)  # heads over both axes, layers whole
    assert shapes['v_col/q/kernel'] == (3, 32)
    assert shapes['v_row/mlp/kernel'] == (16,) and shapes['v_col/mlp/kernel'] == (48,)
    assert shapes['count'] == () and shapes['v/mlp/bias'] == (48,)


class TestMuon:
  CONFIG = OptimConfig(name='muon', lr=1e-2, warmup=0, b1=0.8, b2=0.95)

  def test_equals_optax(self):
    ours, state = _run(self.CONFIG)
    numbers = {
      'q/kernel': optax.contrib.MuonDimensionNumbers((1,), (2, 3)),
      'mlp/kernel': optax.contrib.MuonDimensionNumbers(0, 1),
      'window/kernel': optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,)),
    }
    leaves = leaves_by_path(_tree(0))
    params = {path: leaves[path] for path in numbers}
    muon = optax.contrib.muon(
      1e-2, muon_weight_dimension_numbers=numbers, consistent_rms=optimizer.MUON_RMS
    )
    adam_params = {path: leaf for path, leaf in leaves.items() if path not in numbers}
    adam = optax.adam(1e-2, 0.8, 0.95)
    theirs = _optax_run(muon, params) | _optax_run(adam, adam_params)
    for path, leaf in leaves_by_path(ours).items():
      np.testing.assert_allclose(leaf, theirs[path], rtol=1e-5, atol=1e-6)
    assert int(state['count']) == 3

  def test_matrices_have_no_second_moment(self):
    params = _tree(0)
    state = optimizer.init(params, OptimConfig(name='muon', mu_dtype='bfloat16'), AXES)
    assert leaves_by_path(state['mu']).keys() == leaves_by_path(params).keys()
    assert leaves_by_path(state['nu']).keys() == {'embed/table', 'norm/scale', 'mlp/bias'}
    assert {leaf.dtype for leaf in jax.tree.leaves(state['mu'])} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('name', config_lib.OPTIMIZERS)
def test_weight_decay_shrinks_kernels_in_proportion_to_the_rate(name):
  zero_gradient = jax.tree.map(jnp.zeros_like, _tree(0))
  config = OptimConfig(name=name, lr=0.1, warmup=0, weight_decay=0.5)
  state = optimizer.init(_tree(0), config, AXES)
  after, _ = optimizer.update(zero_gradient, state, _tree(0), jnp.int32(0), config, AXES)
  before, after = leaves_by_path(_tree(0)), leaves_by_path(after)
  np.testing.assert_allclose(after['mlp/kernel'], 0.95 * before['mlp/kernel'], rtol=1e-5)
  np.testing.assert_allclose(after['mlp/bias'], before['mlp/bias'], rtol=1e-6)


def test_optimizers_and_schedules_have_the_names_of_the_config():
  assert tuple(optimizer.OPTIMIZERS) == config_lib.OPTIMIZERS
  assert tuple(optimizer.SCHEDULES) == config_lib.SCHEDULES


def _rates(steps, **settings):
  config = OptimConfig(lr=2.0, **settings)
  return [float(optimizer.learning_rate(step, config)) for step in steps]


class TestLearningRate:
  def test_warms_up_to_a_constant(self):
    assert _rates(range(6), warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert _rates([0], warmup=0) == [2.0]

  @pytest.mark.parametrize('schedule', ['cosine', 'linear', 'rsqrt'])
  def test_decay_begins_after_warm_up(self, schedule):
    rates = _rates(range(40), schedule=schedule, warmup=4, lr_end=0.5, decay_steps=20)
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, rates[4]], rtol=1e-6)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:])) and min(rates[3:]) >= 0.5
    assert rates[4] <= 2.0 and rates[12] < 1.9

  def test_decays_end_at_their_last_step(self):
    settings = {'warmup': 4, 'lr_end': 0.5, 'decay_steps': 20}
    for schedule in ('cosine', 'linear'):
      middle, end, later = _rates([12, 20, 30], schedule=schedule, **settings)
      np.testing.assert_allclose([middle, end, later], [1.25, 0.5, 0.5], rtol=1e-6)

  def test_rsqrt_halves_at_four_times_the_steps(self):
    rates = _rates([3, 15, 63, 999], schedule='rsqrt', warmup=4, lr_end=0.2)
    np.testing.assert_allclose(rates, [2.0, 1.0, 0.5, 0.2], rtol=1e-6)

  def test_decay_steps_default_to_the_steps_of_the_stage(self):
    optim = OptimConfig(schedule=('cosine', 'constant'), decay_steps=(0, 7))
    assert optim.of(0, steps=30).decay_steps == 30 and optim.of(1, steps=30).decay_steps == 7
    with pytest.raises(ValueError, match='decay_steps'):
      optimizer.learning_rate(0, optim.of(0))


class TestMultipliers:
  def test_matching_parameters_have_a_scaled_rate(self):
    config = OptimConfig(lr=1e-2, warmup=0, multipliers=r'mlp/kernel=0.5, .*/(bias|table)=2')
    scaled, plain = _run(config, steps=1)[0], _run(OptimConfig(lr=1e-2, warmup=0), steps=1)[0]
    start, scaled, plain = (leaves_by_path(tree) for tree in (_tree(0), scaled, plain))
    factors = {'mlp/kernel': 0.5, 'mlp/bias': 2.0, 'embed/table': 2.0}
    for path in SHAPES:
      scaled_change, plain_change = scaled[path] - start[path], plain[path] - start[path]
      factor = factors.get(path, 1.0)
      np.testing.assert_allclose(scaled_change, factor * plain_change, rtol=1e-3, atol=1e-6)

  def test_multiplier_without_parameters_is_refused(self):
    config = OptimConfig(multipliers='q/=2,kernel=0.5')
    with pytest.raises(UserError, match="'kernel', which matches no parameter.*embed, mlp"):
      optimizer.check_multipliers(config, leaves_by_path(_tree(0)))


def test_clip_leaves_small_gradients_and_bounds_large_ones():
  gradient = {'kernel': jnp.array([3.0, 4.0])}
  unclipped = optimizer.clip(gradient, jnp.float32(5.0), 6.0)
  np.testing.assert_array_equal(unclipped['kernel'], gradient['kernel'])
  clipped = optimizer.clip(gradient, jnp.float32(5.0), 1.0)
  np.testing.assert_allclose(clipped['kernel'], [0.6, 0.8], rtol=1e-6)
  assert optimizer.clip(gradient, jnp.float32(5.0), 0.0) is gradient
