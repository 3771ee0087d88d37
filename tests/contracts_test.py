"""Contracts: batch specifications, stages and capabilities."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from vpe_jax.contracts import (
  BatchSpec,
  Edits,
  PlansVisually,
  Samples,
  Stage,
  UserError,
  require,
  supports,
)


def _leaf(*shape):
  return jax.ShapeDtypeStruct((4, *shape), jnp.int32)


def test_a_batch_has_no_encoder_inputs_if_all_entries_are_cached():
  spec = BatchSpec(
    inputs={'text': _leaf(8)},
    encoder_inputs={'image': _leaf(2, 2, 3)},
    encoded={'latents': _leaf(5)},
    cacheable=frozenset({'latents'}),
  )
  cached, online = spec.batch(cached=True), spec.batch(cached=False)
  assert cached.inputs.keys() == {'text'} and cached.encoded.keys() == {'latents'}
  assert online.inputs.keys() == {'text', 'image'} and not online.encoded
  assert cached.example.shape == (4,)


def test_uncacheable_entries_need_their_inputs():
  spec = BatchSpec(
    inputs={'text': _leaf(8)},
    encoder_inputs={'image': _leaf(2, 2, 3)},
    encoded={'latents': _leaf(5), 'noisy': _leaf(5)},
    cacheable=frozenset({'latents'}),
  )
  batch = spec.batch(cached=True)
  assert batch.inputs.keys() == {'text', 'image'} and batch.encoded.keys() == {'latents'}


def test_a_capability_is_declared_or_refused():
  config = types.SimpleNamespace(system='toy')
  system = types.SimpleNamespace(config=config, capabilities=(Samples,))
  assert supports(system, Samples) and require(system, Samples) is system
  for capability in (Edits, PlansVisually):
    with pytest.raises(UserError, match="'toy'"):
      require(system, capability)


def test_a_stage_trains_the_paths_that_its_patterns_begin():
  stage = Stage('one', ('head/', 'body/.*/kernel'), {}, ema=False)
  trained = [path for path in ('head/bias', 'body/q/kernel', 'body/q/bias') if stage.trains(path)]
  assert trained == ['head/bias', 'body/q/kernel']
