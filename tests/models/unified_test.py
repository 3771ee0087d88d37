"""The unified model against the released Show-o2 code, and its own laws."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import Region, Visibility, visible
from vpe_jax.data.sequence import NEVER
from vpe_jax.models.dual_path import resize_positions
from vpe_jax.models.unified import Unified, row_visibility

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def golden(show_o2) -> dict[str, np.ndarray]:
  return show_o2.io


def _regions(golden: dict[str, np.ndarray]) -> dict[str, Region]:
  """The golden row without its tail: the text before the image span, and the span."""
  start, length = (int(x) for x in golden['span'])
  ids = jnp.asarray(golden['ids'][:, : start + length], jnp.int32)
  order = jnp.broadcast_to(jnp.arange(start + length, dtype=jnp.int32), ids.shape)
  reach = jnp.where(order < start, order + 1, start + length)
  visibility = Visibility(order, jnp.zeros_like(order), reach, jnp.full_like(order, NEVER))
  zeros = jnp.zeros_like(ids)
  row = Region(ids, order, visibility, zeros, zeros.astype(jnp.float32))
  cut = lambda a, b: jax.tree.map(lambda leaf: leaf[:, a:b], row)
  return {'ar': cut(0, start), 'dit': cut(start, start + length)}


def _close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
  error = np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs))
  assert error < tolerance, f'relative error {error:.2e}'


def test_velocity_and_logits_equal_show_o2(show_o2, golden):
  model, params, regions = Unified(show_o2.config()), show_o2.params(), _regions(golden)
  latents = jnp.asarray(golden['latents']).transpose(0, 2, 3, 1)
  hidden, velocity = jax.jit(model)(params, regions, latents, jnp.asarray(golden['t']))
  logits = hidden @ model.table(params)[: golden['logits'].shape[-1]].T
  _close(logits, golden['logits'][:, : hidden.shape[1]], 2e-5)
  _close(velocity.transpose(0, 3, 1, 2), golden['velocity'], 2e-5)


def test_mask_equals_show_o2(golden):
  row = row_visibility(_regions(golden))
  length = row.order.shape[1]
  wanted = golden['dense_mask'][:, 0, :length, :length]
  np.testing.assert_array_equal(visible(row, row), wanted)


def test_position_table_resize_equals_show_o2(show_o2, golden):
  table = show_o2.params()['dit']['dual_path']['ends']['positions']
  _close(resize_positions(table, 27, 4, 4), golden['pos_embed_resized'][0], 2e-6)


@pytest.mark.parametrize('mutation', ['bias', 'norms', 'theta', 'clock', 'layout'])
def test_parity_notices_a_mistake(show_o2, golden, mutation):
  """The golden weights tell the network from one with a small mistake."""
  config, params, regions = show_o2.config(), show_o2.params(), _regions(golden)
  latents = jnp.asarray(golden['latents']).transpose(0, 2, 3, 1)
  clock = jnp.asarray(golden['t'])
  layers = params['ar']['layers']
  if mutation == 'bias':
    layers['k']['bias'] = layers['k']['bias'] * 0
  elif mutation == 'norms':
    a, b = layers['attention_norm'], layers['mlp_norm']
    layers['attention_norm'], layers['mlp_norm'] = b, a
  elif mutation == 'theta':
    body = dataclasses.replace(config.ar, rope_theta=1e4)
    config = dataclasses.replace(config, ar=body, dit=body)
  elif mutation == 'clock':
    clock = 1 - clock
  _, velocity = jax.jit(Unified(config))(params, regions, latents, clock)
  velocity = velocity.transpose(0, 3, 1, 2)
  if mutation == 'layout':
    velocity = velocity.transpose(0, 1, 3, 2)
  error = np.max(np.abs(velocity - golden['velocity'])) / np.max(np.abs(golden['velocity']))
  assert error > 1e-4, f'the mistake goes unnoticed: {error:.2e}'
