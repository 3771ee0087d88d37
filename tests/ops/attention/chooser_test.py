"""Choice of the implementation, errors of unsupported calls, and sharding on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax import config, sharding
from vpe_jax.contracts import UserError
from vpe_jax.models import mot
from vpe_jax.ops.attention import blockwise, chooser, reference
from vpe_jax.ops.attention.chunked import Chunked
from vpe_jax.ops.attention.pallas_tpu import Tpu


def _abstract(L, S, H=64, dtype=jnp.bfloat16):
  return (jax.ShapeDtypeStruct((2, n, heads, H), dtype) for n, heads in ((L, 4), (S, 2)))


@pytest.mark.parametrize(
  'platform, L, S, options, expected',
  [
    ('cpu', 64, 64, {}, 'reference'),
    ('cpu', 2048, 2048, {}, 'chunked'),
    ('cpu', 2048, 2048, {'bias': True}, 'chunked'),
    ('cpu', 1, 100_000, {}, 'reference'),
    ('tpu', 1025, 1856, {}, 'pallas_tpu'),
    ('tpu', 1025, 1856, {'bias': True}, 'chunked'),
    ('tpu', 1025, 1856, {'H': 512}, 'chunked'),
    ('tpu', 15, 100_000, {}, 'reference'),
    ('gpu', 1025, 1856, {}, 'pallas_gpu'),
    ('gpu', 1024, 1024, {'hint': 'padding'}, 'cudnn'),
    ('gpu', 1024, 1024, {'hint': 'causal'}, 'cudnn'),
    ('gpu', 1024, 1024, {'hint': 'padding', 'dtype': jnp.float32}, 'pallas_gpu'),
    ('gpu', 1024, 1024, {'hint': 'padding', 'H': 256}, 'pallas_gpu'),
    ('rocket', 2048, 2048, {}, 'chunked'),
  ],
)
def test_default_by_platform_shape_and_mask(monkeypatch, platform, L, S, options, expected):
  monkeypatch.setattr(chooser, 'device', lambda: (platform, 'kind'))
  q, k = _abstract(L, S, options.get('H', 64), options.get('dtype', jnp.bfloat16))
  bias = jnp.zeros(()) if options.get('bias') else None
  assert chooser._choose(q, k, '', bias, options.get('hint', '')) == expected


@pytest.mark.parametrize(
  'name, platform, options, message',
  [
    ('referense', 'cpu', {}, "did you mean 'reference'"),
    ('pallas_tpu', 'cpu', {}, 'runs on tpu, and the devices are cpu'),
    ('pallas_gpu', 'tpu', {}, 'runs on gpu, and the devices are tpu'),
    ('pallas_tpu', 'tpu', {'bias': True}, 'takes no bias'),
    ('pallas_gpu', 'gpu', {'bias': True}, 'takes no bias'),
    ('cudnn', 'gpu', {'bias': True, 'hint': 'causal'}, 'takes no bias'),
    ('pallas_tpu', 'tpu', {'H': 512}, 'up to 256 wide, not 512'),
    ('cudnn', 'gpu', {}, 'needs a mask that is known to be causal or padding'),
    ('cudnn', 'gpu', {'hint': 'causal', 'dtype': jnp.float32}, 'computes in bfloat16'),
    ('cudnn', 'gpu', {'hint': 'causal', 'H': 36}, 'or 128 wide, not 36'),
    ('chunked', 'cpu', {'hint': 'casual'}, "did you mean 'causal'"),
  ],
)
def test_unsupported_calls_are_errors(monkeypatch, name, platform, options, message):
  monkeypatch.setattr(chooser, 'device', lambda: (platform, 'kind'))
  q, k = _abstract(64, 64, options.get('H', 64), options.get('dtype', jnp.bfloat16))
  bias = jnp.zeros(()) if options.get('bias') else None
  with pytest.raises(UserError, match=message) as error:
    chooser._choose(q, k, name, bias, options.get('hint', ''))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('capability', ['7.5', 'gfx942'])
def test_gpus_that_no_kernel_supports_run_chunked(monkeypatch, capability):
  monkeypatch.setattr(chooser, 'device', lambda: ('gpu', 'Tesla T4'))
  monkeypatch.setattr(chooser, '_compute_capability', lambda: capability)
  q, k = _abstract(1024, 1024)
  assert chooser._choose(q, k, '', None, 'padding') == 'chunked'
  for name in ('cudnn', 'pallas_gpu'):
    with pytest.raises(UserError, match='Ampere'):
      chooser._choose(q, k, name, None, 'padding')
  monkeypatch.setattr(chooser, '_compute_capability', lambda: '12.0')
  assert chooser._choose(q, k, '', None, 'padding') == 'cudnn'


def test_every_name_of_the_config_is_an_implementation(monkeypatch):
  for name in config.ATTENTIONS:
    home = chooser._HOME.get(name, 'cpu')
    monkeypatch.setattr(chooser, 'device', lambda home=home: (home, 'kind'))
    q, k = _abstract(64, 64)
    assert chooser._choose(q, k, name, None, 'causal') == name


def test_the_choice_is_logged_once_per_shape(masks, caplog):
  case = masks.case(masks.causal(33), heads=(2, 1, 8))
  with caplog.at_level('INFO', logger='absl'):
    for _ in range(3):
      chooser.attention(*case.inputs, *case.mask)
  lines = [line for line in caplog.messages if 'attention: reference for q (1, 33, 2, 8)' in line]
  assert len(lines) == 1


def test_named_implementations_agree_and_return_the_log_sum_exp(masks):
  case = masks.case(masks.transfusion(20, 30, 4))
  call = jax.jit(lambda *inputs: chooser.attention_and_lse(*inputs, *case.mask, 'chunked'))
  mixed, lse = call(*case.inputs)
  expected, expected_lse = reference.attention(*case.inputs, *case.mask)
  np.testing.assert_allclose(mixed, expected, atol=2e-6)
  np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
  np.testing.assert_array_equal(chooser.attention(*case.inputs, *case.mask, 'reference'), expected)
  with pytest.raises(UserError, match='no log-sum-exp'):
    chooser.attention_and_lse(*case.inputs, *case.mask, 'cudnn')


@pytest.mark.parametrize(
  'kernel, batch, heads, spec',
  [
    (Chunked(32, 16), 4, (4, 2, 16), (('data', 'fsdp'), 'tensor')),
    (Tpu(32, 16, interpret=True), 4, (2, 2, 8), (('data', 'fsdp'), 'tensor')),
    (Chunked(32, 16), 3, (3, 1, 16), (None, None)),
  ],
)
def test_sharded_equals_unsharded(masks, kernel, batch, heads, spec):
  """Batch and heads are sharded if divisible: 4 sequences and 2 heads are, 3 and 1 are not."""
  sequence = jax.tree.map(lambda x: jnp.repeat(x, batch, 0), masks.transfusion(10, 20, 5)[0])
  case = masks.case((sequence, sequence), heads=heads)
  run = masks.differentiated(
    lambda q, k, v, query, key: blockwise.attend(kernel, blockwise.Operands(q, k, v, query, key))
  )
  unsharded = run(case)
  with jax.set_mesh(sharding.make_mesh(config.MeshConfig(2, 2, 2, 'fsdp_tensor'))):
    assert blockwise._specs(blockwise.Operands(*case.inputs, sequence, sequence)).wide == jax.P(
      spec[0], None, spec[1], None
    )
    sharded = run(case)
    # One shard_map for the forward pass, one for the backward pass.
    assert str(jax.make_jaxpr(run)(case)).count('shard_map[') == 2
  for ours, theirs in zip(sharded, unsharded, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_platform_is_that_of_the_mesh():
  assert chooser.device()[0] == 'cpu'
  mesh = sharding.make_mesh(config.MeshConfig())
  with jax.set_mesh(mesh):
    assert chooser.device() == ('cpu', jax.devices()[0].device_kind)


@pytest.mark.parametrize(
  'remat, forwards', [('none', 1), ('full', 2), ('attention', 1), ('dots', 1)]
)
def test_only_full_remat_runs_attention_twice(masks, remat, forwards):
  case = masks.case(masks.causal(40))
  kernel = Tpu(32, 16, interpret=True)

  def layer(x):
    mixed, _ = blockwise.attend(kernel, blockwise.Operands(x, *case.inputs[1:], *case.mask))
    return jnp.sin(mixed)

  policy = mot.REMAT[remat]
  layer = layer if policy is None else jax.checkpoint(layer, policy=policy)
  gradient = jax.grad(lambda x: jnp.sum(jnp.sin(layer(jnp.sin(x)))))
  text = str(jax.make_jaxpr(gradient)(case.inputs[0]))
  assert text.count('name=attention_forward') == forwards
  assert text.count('name=attention_dkv') == 1
