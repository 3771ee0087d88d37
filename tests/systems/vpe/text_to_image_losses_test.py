"""Losses of text to image, written out from their definitions: what is compared with what."""

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
  # Half of each kind is dropped, so that every kind of row is among the eight; Show-o2's shift.
  config.model.update(drop=0.5, drop_text=0.5, flow={'shift_by': 'resolution'})
  return systems.build(config.to_dict())


def _kept(name: str, share: float) -> np.ndarray:
  draw = lambda key: jax.random.uniform(key) >= share
  return np.asarray(rng.per_example(draw, KEY, name, jnp.arange(B)))


def _noisy(latents, shift: float):
  """x_t, the time t (1 is noise), and data minus noise."""
  per_example = lambda draw, name: rng.per_example(draw, KEY, name, jnp.arange(B))
  drawn = jax.nn.sigmoid(per_example(lambda key: jax.random.normal(key), 'time'))
  time = shift * drawn / (1 + (shift - 1) * drawn)
  noise = per_example(lambda key: jax.random.normal(key, latents.shape[1:]), 'noise')
  spread = time[:, None, None, None]
  return (1 - spread) * latents + spread * noise, time, latents - noise


@pytest.mark.parametrize('arch, name', [('internal', 'joint'), ('external', 'render')])
def test_losses_are_those_of_the_definitions(arch, name):
  system = _system(arch)
  index = [stage.name for stage in system.stages].index(name)
  # As held-out evaluation runs it: External's stage has both losses too.
  stage = dataclasses.replace(heldout.with_all_losses(system.stages, index), training=True)
  params = redrawn(jax.jit(system.init)(KEY), 0.1)
  batch, step = encoded_examples(system, B), jnp.int32(5)
  terms = jax.jit(lambda p: system.losses(p, {}, batch, KEY, step, stage))(params)

  keep, told = _kept('drop', 0.5), _kept('drop_text', 0.5)
  assert 0 < keep.sum() < B and 0 < told[keep].sum() < keep.sum()
  shown = with_inputs(batch, text_length=jnp.where(told, batch.inputs['text_length'], 0))
  shift = float(np.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (65 - 256)))  # of 64 tokens and time's
  x, time, wanted = _noisy(batch.encoded['latents'], shift)
  keeps = dict.fromkeys(('prompt', 'visual_prompt'), jnp.ones(B, bool))
  keeps['prompt' if arch == 'internal' else 'visual_prompt'] = jnp.asarray(keep)
  regions = system.experts.regions(shown, batch.encoded['visual_prompt'], keeps)
  # Show-o2's clock is 1 at data, and its velocity leads there.
  call = jax.jit(lambda p: system.experts.forward(p, regions, (x, 1 - time), None))
  hidden, velocity = call(params)
  error = float(jnp.sum(jnp.square(velocity - wanted)))
  np.testing.assert_allclose(float(terms['flow'].sum), error, rtol=1e-5)

  # [bot] predicts the first code, each code the next, and the last [eot].
  vocabulary, P = system.experts.ar.vocabulary, batch.encoded['visual_prompt'].shape[1]
  bot = system.layout.place('bot')[0]
  table = jnp.concatenate([params['embed']['text'], params['embed']['codes']])
  logits = jax.nn.log_softmax(hidden[:, bot : bot + P + 1] @ table.T)
  ends = jnp.full((B, 1), vocabulary.text + vocabulary.codes + 1)
  targets = jnp.concatenate([batch.encoded['visual_prompt'] + vocabulary.text, ends], 1)
  picked = np.asarray(jnp.take_along_axis(logits, targets[..., None], -1))[..., 0]
  planned = keep if arch == 'internal' else np.ones(B, bool)  # External's tokens keep their plan
  np.testing.assert_allclose(float(terms['next_token'].sum), -picked[planned].sum(), rtol=1e-5)
  right = (np.asarray(logits.argmax(-1)) == targets)[planned].sum()
  assert float(terms['accuracy'].sum) == right

  # Eq. 3 at step 5 of 12.
  grown = 1 / (1 + np.exp(-10 * (5 / 12 - 0.5)))
  weight = 0.03 * (1 - grown) + 0.1 * grown if arch == 'internal' else 0.0
  np.testing.assert_allclose(float(terms['next_token'].weight), weight, rtol=1e-5)
  assert float(terms['flow'].weight) == 1.0
