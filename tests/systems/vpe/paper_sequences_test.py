"""Rows of the paper's length: 1,854 tokens, and 1,856 with the tail that we leave out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import t2i
from tests.small_systems import encoded_examples, redrawn
from vpe_jax import rng, systems
from vpe_jax.sequence.spans import Layout, Span
from vpe_jax.systems.vpe import layouts

KEY = rng.run_key(0)
# Nothing reads what stands there, so the id of [eoi] does for both.
TAIL = Span('eoi', 2, 'ar')


def _system(arg: str):
  config = t2i.get_config(arg)
  config.data.source = 'synthetic'
  return systems.build(config.to_dict())


def _with_tail(layout: Layout) -> Layout:
  return Layout((*layout.spans, TAIL))


@pytest.mark.parametrize('arch', ['internal', 'single'])
def test_tokens_of_the_papers_row(arch):
  system = _system(f'paper,arch={arch}')
  names = [(span.name, span.length) for span in system.layout.spans]
  told = [('bos', 1), ('text', 249), ('bot', 1), ('codes', 576), ('eot', 1), ('boi', 1)]
  assert names == [*told, ('time', 1), ('latents', 1024)]
  count = lambda layout: sum(span.length for span in layout.spans)
  assert (count(system.layout), count(_with_tail(system.layout))) == (1854, 1856)
  # Stored expert by expert, each rounded up to what the chip's tiles take.
  experts = {'ar': 829, 'dit': 1025}
  assert {name: system.layout.region_length(name) for name in experts} == experts
  assert system.tokens(system.stages[-1]) == 832 + 1040


def test_a_row_with_its_tail_is_the_same_row():
  """The tail sees the picture and is seen by nothing: no output and no gradient knows of it."""
  system = _system('debug')
  params = redrawn(jax.jit(system.init)(KEY), 0.1)
  batch, keep = encoded_examples(system, 4), jnp.array([True, True, False, True])

  rows = (*batch.inputs.values(), batch.encoded['visual_prompt'])

  def run(params, layout):
    regions = layouts.build(layout, system.experts.ar.vocabulary, *rows, keep)
    hidden, velocity = system.model(params, regions, batch.encoded['latents'], jnp.full((4,), 0.3))
    tokens = system.layout.region_length('ar')
    seen = regions['ar'].visibility.reach[:, :tokens, None] > 0
    return jnp.where(seen, hidden[:, :tokens], 0), velocity

  def both(params, layout):
    hidden, velocity = run(params, layout)
    return jnp.sum(jnp.square(hidden)) + jnp.sum(jnp.square(velocity)), (hidden, velocity)

  call = jax.jit(jax.value_and_grad(both, has_aux=True), static_argnums=1)
  without, kept = call(params, system.layout), call(params, _with_tail(system.layout))
  largest = lambda leaf: float(jnp.max(jnp.abs(leaf)))
  # (Softmax doesn't see a shift of all logits: gradients of key biases are rounding alone.)
  for one, other in zip(jax.tree.leaves(without), jax.tree.leaves(kept), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * (1 + largest(one)))
  # The tail itself does see the picture: a row that ended in a token of text wouldn't.
  row = layouts.build(_with_tail(system.layout), system.experts.ar.vocabulary, *rows, keep)
  last = row['ar'].visibility.reach[:, -1]
  assert (last > row['dit'].visibility.order.max(1)).all()
