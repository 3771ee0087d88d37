"""Rows of the paper's length: 1,854 tokens, and 1,856 with the tail that we leave out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import t2i
from tests.small_systems import encoded_examples, redrawn
from vpe_jax import rng, systems
from vpe_jax.data import sequence

KEY = rng.run_key(0)
# Nothing reads what stands there, so the id of [eoi] does for both.
TAIL = (sequence.Span('eoi', 2, 'ar'),)


def _system(arg: str):
  config = t2i.get_config(arg)
  config.data.source = 'synthetic'
  return systems.build(config.to_dict())


@pytest.mark.parametrize('arch', ['internal', 'single'])
def test_tokens_of_the_papers_row(arch):
  system = _system(f'paper,arch={arch}')
  kinds = [(span.kind, span.length) for span in system.spans]
  told = [('bos', 1), ('text', 249), ('bot', 1), ('codes', 576), ('eot', 1), ('boi', 1)]
  assert kinds == [*told, ('time', 1), ('latents', 1024)]
  count = lambda spans: sum(span.length for span in spans)
  assert (count(system.spans), count((*system.spans, *TAIL))) == (1854, 1856)
  # Stored expert by expert, each rounded up to what the chip's tiles take.
  stored = lambda spans, expert: sequence.region_length(spans, expert, 1)
  experts = {'ar': 829, 'dit': 1025}
  assert {name: stored(system.spans, name) for name in experts} == experts
  assert system.tokens(system.stages[-1]) == 832 + 1040


def test_a_row_with_its_tail_is_the_same_row():
  """The tail sees the picture and is seen by nothing: no output and no gradient knows of it."""
  system = _system('debug')
  params = redrawn(jax.jit(system.init)(KEY), 0.1)
  batch, keep = encoded_examples(system, 4), jnp.array([True, True, False, True])

  rows = (*batch.inputs.values(), batch.encoded['visual_prompt'])

  def run(params, spans):
    regions = sequence.build(spans, system.vocabulary, *rows, keep)
    hidden, velocity = system.model(params, regions, batch.encoded['latents'], jnp.full((4,), 0.3))
    tokens = sequence.region_length(system.spans, 'ar', 1)
    seen = regions['ar'].visibility.reach[:, :tokens, None] > 0
    return jnp.where(seen, hidden[:, :tokens], 0), velocity

  def both(params, spans):
    hidden, velocity = run(params, spans)
    return jnp.sum(jnp.square(hidden)) + jnp.sum(jnp.square(velocity)), (hidden, velocity)

  call = jax.jit(jax.value_and_grad(both, has_aux=True), static_argnums=1)
  without, kept = call(params, system.spans), call(params, (*system.spans, *TAIL))
  largest = lambda leaf: float(jnp.max(jnp.abs(leaf)))
  # (Softmax doesn't see a shift of all logits: gradients of key biases are rounding alone.)
  for one, other in zip(jax.tree.leaves(without), jax.tree.leaves(kept), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * (1 + largest(one)))
  # The tail itself does see the picture: a row that ended in a token of text wouldn't.
  row = sequence.build((*system.spans, *TAIL), system.vocabulary, *rows, keep)
  last = row['ar'].visibility.reach[:, -1]
  assert (last > row['dit'].visibility.order.max(1)).all()
