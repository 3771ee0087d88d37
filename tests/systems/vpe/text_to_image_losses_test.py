"""Losses of text to image against a plain implementation of their definitions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import t2i
from tests.small_systems import encoded_examples, redrawn, with_inputs
from vpe_jax import rng, systems
from vpe_jax.evaluation import heldout

KEY, B = rng.run_key(0), 8


def _system(arch: str):
  config = t2i.get_config(f'debug,arch={arch}')
  config.data.source = 'synthetic'
  # Dropped from half, so that the eight sequences have every combination; Show-o2's shift.
  config.model.update(drop=0.5, drop_text=0.5, flow={'shift_by': 'resolution'})
  return systems.build(config.to_dict())


def _keep(name: str, share: float) -> np.ndarray:
  draw = lambda key: jax.random.uniform(key) >= share
  return np.asarray(rng.per_example(draw, KEY, name, jnp.arange(B)))


def _noisy(latents, shift: float):
  """x_t, the time t (1 is noise), and data minus noise."""
  per_example = lambda draw, name: rng.per_example(draw, KEY, name, jnp.arange(B))
  unshifted = jax.nn.sigmoid(per_example(lambda key: jax.random.normal(key), 'time'))
  time = shift * unshifted / (1 + (shift - 1) * unshifted)
  noise = per_example(lambda key: jax.random.normal(key, latents.shape[1:]), 'noise')
  noise_share = time[:, None, None, None]
  return (1 - noise_share) * latents + noise_share * noise, time, latents - noise


@pytest.mark.parametrize('arch, name', [('internal', 'joint'), ('external', 'render')])
def test_losses_equal_their_definitions(arch, name):
  system = _system(arch)
  index = [stage.name for stage in system.stages].index(name)
  # As held-out evaluation runs it: External's stage has both losses too.
  stage = dataclasses.replace(heldout.with_all_losses(system.stages, index), training=True)
  params = redrawn(jax.jit(system.init)(KEY), 0.1)
  batch, step = encoded_examples(system, B), jnp.int32(5)
  terms = jax.jit(lambda p: system.losses(p, {}, batch, KEY, step, stage))(params)

  keep, keep_text = _keep('drop', 0.5), _keep('drop_text', 0.5)
  assert 0 < keep.sum() < B and 0 < keep_text[keep].sum() < keep.sum()
  batch_with_drops = with_inputs(
    batch, text_length=jnp.where(keep_text, batch.inputs['text_length'], 0)
  )
  # Show-o2's shift at 65 tokens: 64 of the image and the time.
  shift = float(np.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (65 - 256)))
  x, time, target = _noisy(batch.encoded['latents'], shift)
  keeps = dict.fromkeys(('prompt', 'visual_prompt'), jnp.ones(B, bool))
  keeps['prompt' if arch == 'internal' else 'visual_prompt'] = jnp.asarray(keep)
  regions = system.experts.regions(batch_with_drops, batch.encoded['visual_prompt'], keeps)
  # Show-o2's time is 1 at data, and its velocity points there.
  call = jax.jit(lambda p: system.experts.forward(p, regions, (x, 1 - time), None))
  hidden, velocity = call(params)
  error = float(jnp.sum(jnp.square(velocity - target)))
  np.testing.assert_allclose(float(terms['flow'].sum), error, rtol=1e-5)

  # [bot] predicts the first code, each code the next, and the last [eot].
  vocabulary, P = system.experts.ar.vocabulary, batch.encoded['visual_prompt'].shape[1]
  bot = system.layout.place('bot')[0]
  table = jnp.concatenate([params['embed']['text'], params['embed']['codes']])
  logits = jax.nn.log_softmax(hidden[:, bot : bot + P + 1] @ table.T)
  ends = jnp.full((B, 1), vocabulary.text + vocabulary.codes + 1)
  targets = jnp.concatenate([batch.encoded['visual_prompt'] + vocabulary.text, ends], 1)
  log_probs = np.asarray(jnp.take_along_axis(logits, targets[..., None], -1))[..., 0]
  # External's AR expert has every visual prompt.
  has_prompt = keep if arch == 'internal' else np.ones(B, bool)
  np.testing.assert_allclose(
    float(terms['next_token'].sum), -log_probs[has_prompt].sum(), rtol=1e-5
  )
  correct = (np.asarray(logits.argmax(-1)) == targets)[has_prompt].sum()
  assert float(terms['accuracy'].sum) == correct

  # Eq. 3 at step 5 of 12.
  progress = 1 / (1 + np.exp(-10 * (5 / 12 - 0.5)))
  weight = 0.03 * (1 - progress) + 0.1 * progress if arch == 'internal' else 0.0
  np.testing.assert_allclose(float(terms['next_token'].weight), weight, rtol=1e-5)
  assert float(terms['flow'].weight) == 1.0
