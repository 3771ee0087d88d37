"""The unified model: parity with the released Show-o2 code."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vpe_jax.contracts import visible
from vpe_jax.models.unified import Unified, sequence_visibility
from vpe_jax.models.vit import resize_positions

pytestmark = pytest.mark.parity


def _close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
  error = np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs))
  assert error < tolerance, f'relative error {error:.2e}'


def test_velocity_and_logits_equal_show_o2(show_o2):
  params, golden = show_o2.params(), show_o2.io
  hidden, velocity = show_o2.run(params)
  logits = hidden @ Unified(show_o2.sizes).table(params)[: golden['logits'].shape[-1]].T
  _close(logits, golden['logits'][:, : hidden.shape[1]], 2e-5)
  _close(velocity.transpose(0, 3, 1, 2), golden['velocity'], 2e-5)


def test_mask_equals_show_o2(show_o2):
  sequence = sequence_visibility(show_o2.regions)
  length = sequence.order.shape[1]
  expected = show_o2.io['dense_mask'][:, 0, :length, :length]
  np.testing.assert_array_equal(visible(sequence, sequence), expected)


def test_position_table_resize_equals_show_o2(show_o2):
  table = show_o2.params()['dit']['dual_path']['ends']['positions']
  _close(resize_positions(table, 27, 4, 4), show_o2.io['pos_embed_resized'][0], 2e-6)


@pytest.mark.parametrize('mutation', ['bias', 'norms', 'theta', 'clock', 'layout'])
def test_parity_notices_a_mistake(show_o2, mutation):
  """A network with a small mistake fails parity with the golden outputs."""
  sizes, params, clock = show_o2.sizes, show_o2.params(), show_o2.clock
  layers = params['ar']['layers']
  if mutation == 'bias':
    layers['k']['bias'] = layers['k']['bias'] * 0
  elif mutation == 'norms':
    a, b = layers['attention_norm'], layers['mlp_norm']
    layers['attention_norm'], layers['mlp_norm'] = b, a
  elif mutation == 'theta':
    body = dataclasses.replace(sizes.ar, rope_theta=1e4)
    sizes = dataclasses.replace(sizes, ar=body, dit=body)
  elif mutation == 'clock':
    clock = 1 - clock
  _, velocity = show_o2.run(params, sizes, clock)
  velocity, expected = velocity.transpose(0, 3, 1, 2), show_o2.io['velocity']
  if mutation == 'layout':
    velocity = velocity.transpose(0, 1, 3, 2)
  error = np.max(np.abs(velocity - expected)) / np.max(np.abs(expected))
  assert error > 1e-4, f'the mistake goes unnoticed: {error:.2e}'
