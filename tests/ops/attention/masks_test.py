"""The masks of the five systems equal those in their docstrings."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention.masks import BUILDERS
from vpe_jax.contracts import visible


def test_every_mask_has_a_version_of_several_blocks(masks):
  assert set(masks.builders) == set(masks.sized)


@pytest.mark.parametrize('name', BUILDERS)
def test_masks_equal_those_in_the_docstrings(masks, name):
  builder = masks.builders[name]
  lines = re.findall(r'^ *((?:[01] )+[01])$', builder.__doc__, re.MULTILINE)
  expected = np.array([line.split() for line in lines], int)
  mask = np.asarray(visible(*builder()), int)
  np.testing.assert_array_equal(mask.reshape(-1, mask.shape[-1]), expected)


def test_noise_reaches_no_clean_latent_and_no_other_frame(masks):
  frames, text, latents = 3, 2, 2
  mask = np.asarray(visible(*masks.interleaved(frames, text, latents)))[0]
  closure = mask
  for _ in range(len(mask)):
    closure = closure | (closure.astype(int) @ mask.astype(int) > 0)
  kind = np.tile(['text'] * text + ['noisy'] * latents + ['clean'] * latents, frames)
  frame = np.repeat(np.arange(frames), text + 2 * latents)
  noisy, clean = kind == 'noisy', kind == 'clean'
  assert not closure[np.ix_(clean, noisy)].any()
  assert not (closure & noisy & noisy[:, None] & (frame != frame[:, None])).any()
  # Noisy latents see the text of their frame, and the clean latents of every earlier frame.
  assert mask[np.ix_(noisy & (frame == 2), clean & (frame < 2))].all()
  assert mask[np.ix_(noisy & (frame == 1), (kind == 'text') & (frame == 1))].all()


def test_the_closure_detects_text_that_leaks_noise(masks):
  # Text that sees its frame's noisy latents, and clean latents that see that text: two steps.
  sequence, _ = masks.interleaved(1, 1, 1)
  text = jnp.array([[1, 0, 0]], bool)
  sequence = type(sequence)(
    sequence.order,
    sequence.since,
    jnp.where(text, 2, sequence.reach),
    jnp.where(text, 9, sequence.until),
  )
  mask = np.asarray(visible(sequence, sequence), int)[0]
  assert not mask[2, 1] and (mask @ mask)[2, 1]
