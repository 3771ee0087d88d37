"""Sequences of the paper: 1,854 tokens, and 1,856 with the tail that we leave out."""

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
# Nothing reads these tokens, so the id of [eoi] serves for both.
TAIL = Span('eoi', 2, 'ar')


def _system(arg: str):
  config = t2i.get_config(arg)
  config.data.source = 'synthetic'
  return systems.build(config.to_dict())


def _with_tail(layout: Layout) -> Layout:
  return Layout((*layout.spans, TAIL))


@pytest.mark.parametrize('arch', ['internal', 'single'])
def test_tokens_of_the_papers_sequence(arch):
  system = _system(f'paper,arch={arch}')
  names = [(span.name, span.length) for span in system.layout.spans]
  condition = [('bos', 1), ('text', 249), ('bot', 1), ('codes', 576), ('eot', 1), ('boi', 1)]
  assert names == [*condition, ('time', 1), ('latents', 1024)]
  count = lambda layout: sum(span.length for span in layout.spans)
  assert (count(system.layout), count(_with_tail(system.layout))) == (1854, 1856)
  # Stored expert by expert, each rounded up to a multiple of the chip's tiles.
  experts = {'ar': 829, 'dit': 1025}
  assert {name: system.layout.region_length(name) for name in experts} == experts
  assert system.tokens(system.stages[-1]) == 832 + 1040


def test_the_tail_changes_no_output_and_no_gradient():
  """The tail sees the image, and no token sees the tail."""
  system = _system('debug')
  params = redrawn(jax.jit(system.init)(KEY), 0.1)
  batch, keep = encoded_examples(system, 4), jnp.array([True, True, False, True])

  tokens = (*batch.inputs.values(), batch.encoded['visual_prompt'])

  def run(params, layout):
    regions = layouts.build(layout, system.experts.ar.vocabulary, *tokens, keep)
    hidden, velocity = system.model(params, regions, batch.encoded['latents'], jnp.full((4,), 0.3))
    length = system.layout.region_length('ar')
    seen = regions['ar'].visibility.reach[:, :length, None] > 0
    return jnp.where(seen, hidden[:, :length], 0), velocity

  def squares(params, layout):
    hidden, velocity = run(params, layout)
    return jnp.sum(jnp.square(hidden)) + jnp.sum(jnp.square(velocity)), (hidden, velocity)

  call = jax.jit(jax.value_and_grad(squares, has_aux=True), static_argnums=1)
  without_tail, with_tail = (
    call(params, layout) for layout in (system.layout, _with_tail(system.layout))
  )
  largest = lambda leaf: float(jnp.max(jnp.abs(leaf)))
  # (Softmax doesn't see a shift of all logits: gradients of key biases are rounding alone.)
  for ours, theirs in zip(jax.tree.leaves(without_tail), jax.tree.leaves(with_tail), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * (1 + largest(ours)))
  # The tail itself does see the image; a text token at the end wouldn't.
  regions = layouts.build(_with_tail(system.layout), system.experts.ar.vocabulary, *tokens, keep)
  last = regions['ar'].visibility.reach[:, -1]
  assert (last > regions['dit'].visibility.order.max(1)).all()
