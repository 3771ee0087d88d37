"""Attention, forward and backward, at rows of 1k to 8k tokens: time and peak memory.

  python -m tests.benchmarks.attention --json=attention.json
  python -m tests.benchmarks.attention --lengths=1856 --batch=4 --heads=12,2,128   (the paper's)

Runs every implementation that this machine has, on a causal mask and on that of a Mixture of
Transformers (829 tokens of text and visual prompt to 1,027 of picture, as the paper has them).
Outputs and gradients must agree first, to the rounding of the dtype. `ratios` are `reference` over
the other: `time/...` (above 1: faster), and `memory/...` of the temporary bytes that the compiler
assigns. cuDNN runs on the causal mask alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from tests.benchmarks import timing
from vpe_jax.config import ATTENTIONS
from vpe_jax.contracts import UserError, Visibility
from vpe_jax.ops.attention import chooser
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import causal_text
from vpe_jax.sequence.spans import Layout, Span

TOLERANCE = {'float32': timing.TOLERANCE, 'bfloat16': 2e-2}
flags.DEFINE_list('lengths', ['1024', '2048', '4096', '8192'], 'tokens of a row')
flags.DEFINE_list('heads', ['4', '2', '64'], 'heads of queries, heads of keys, and their width')
flags.DEFINE_integer('batch', 1, 'rows')
flags.DEFINE_enum('dtype', '', ['', *TOLERANCE], 'default: float32 on CPU, elsewhere bfloat16')
flags.DEFINE_integer('rounds', 5, 'counted rounds')


def causal(length: int) -> Visibility:
  """Text alone."""
  return build(causal_text(length), keep=jnp.ones((1,), bool))['text'].visibility


def mixture(length: int) -> Visibility:
  """Causal tokens, then a bidirectional image."""
  text = length * 829 // 1856
  spans = (Span('text', text, 'row'), Span('image', length - text, 'row', full=True))
  return build(Layout(spans), keep=jnp.ones((1,), bool))['row'].visibility


def _step(name: str, hint: str) -> Callable[..., Any]:
  def loss(q: jax.Array, k: jax.Array, v: jax.Array, row: Visibility) -> tuple[Any, jax.Array]:
    mixed = chooser.attention(q, k, v, row, row, name, hint=hint)
    return jnp.sum(jnp.sin(mixed.astype(jnp.float32))), mixed

  return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


def _dtype() -> str:
  return flags.FLAGS.dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')


def _check(results: dict[str, Any]) -> None:
  """Outputs and gradients agree, relative to the largest of each."""
  for name, given in results.items():
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(results['reference']), strict=True):
      timing.check_equal(a, b, name, TOLERANCE[_dtype()])


def measure_mask(length: int, mask: Callable[[int], Visibility]) -> dict[str, dict[str, float]]:
  """Milliseconds, temporary bytes and both ratios of each implementation that runs here."""
  keys, B = jax.random.split(jax.random.key(0), 3), flags.FLAGS.batch
  N, K, H = map(int, flags.FLAGS.heads)
  q, k, v = (
    jax.random.normal(key, (B, length, heads, H)).astype(_dtype())
    for key, heads in zip(keys, (N, K, K))
  )
  row = jax.tree.map(lambda x: jnp.repeat(x, B, 0), mask(length))
  inputs, hint, steps = (q, k, v, row), 'causal' if mask is causal else '', {}
  for name in ATTENTIONS:
    try:
      steps[name] = jax.jit(_step(name, hint)).lower(*inputs).compile()
    except UserError as error:
      print(f'{length} {mask.__name__}: {name} is not here: {error}', flush=True)
  _check({name: step(*inputs) for name, step in steps.items()})
  calls = {n: lambda step=step: jax.block_until_ready(step(*inputs)) for n, step in steps.items()}
  seconds = timing.alternate(calls, flags.FLAGS.rounds)
  milliseconds = timing.medians(seconds)
  held = {name: step.memory_analysis().temp_size_in_bytes for name, step in steps.items()}
  return {
    name: {
      'milliseconds': milliseconds[name],
      'temporary_bytes': held[name],
      'time': timing.ratio(seconds, name, 'reference'),
      'memory': round(held['reference'] / held[name], 2),
    }
    for name in steps
  }


def measure() -> dict[str, Any]:
  """Every mask at every length."""
  found = {
    f'{mask.__name__}/{length}': measure_mask(int(length), mask)
    for length in flags.FLAGS.lengths
    for mask in (causal, mixture)
  }
  ratios = {
    f'{what}/{name}/{where}': figures[what]
    for where, rows in found.items()
    for name, figures in rows.items()
    for what in ('time', 'memory')
    if name != 'reference'
  }
  shape = {'batch': flags.FLAGS.batch, 'heads': flags.FLAGS.heads, 'dtype': _dtype()}
  return {'ratios': ratios, 'shape': shape, 'cases': found}


if __name__ == '__main__':
  timing.main(measure)
