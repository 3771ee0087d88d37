"""Attention, forward and backward, for sequences of 1k to 8k tokens: time and peak memory.

  python -m tests.benchmarks.attention --json=attention.json
  python -m tests.benchmarks.attention --lengths=1856 --batch=4 --heads=12,2,128   (the paper's)

Runs every implementation that this machine supports, on a causal mask and on the mask of a Mixture
of Transformers (829 tokens of text and visual prompt, then 1,027 of the image, as in the paper).
Outputs and gradients must first agree within the rounding of the dtype. `ratios` divide `reference`
by each implementation: `time/...` (above 1: faster), and `memory/...` of the temporary bytes that
the compiler assigns. cuDNN runs only on the causal mask.
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
flags.DEFINE_list('lengths', ['1024', '2048', '4096', '8192'], 'tokens of a sequence')
flags.DEFINE_list('heads', ['4', '2', '64'], 'query heads, key heads, and their width')
flags.DEFINE_integer('batch', 1, 'sequences')
flags.DEFINE_enum('dtype', '', ['', *TOLERANCE], 'default: float32 on CPU, elsewhere bfloat16')
flags.DEFINE_integer('rounds', 5, 'timed rounds')


def causal(length: int) -> Visibility:
  """Visibility of causal text."""
  return build(causal_text(length), keep=jnp.ones((1,), bool))['text'].visibility


def mixture(length: int) -> Visibility:
  """Visibility of causal tokens and a bidirectional image."""
  text = length * 829 // 1856
  spans = (Span('text', text, 'all'), Span('image', length - text, 'all', full=True))
  return build(Layout(spans), keep=jnp.ones((1,), bool))['all'].visibility


def _step(name: str, hint: str) -> Callable[..., Any]:
  def loss(q: jax.Array, k: jax.Array, v: jax.Array, mask: Visibility) -> tuple[Any, jax.Array]:
    mixed = chooser.attention(q, k, v, mask, mask, name, hint=hint)
    return jnp.sum(jnp.sin(mixed.astype(jnp.float32))), mixed

  return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


def _dtype() -> str:
  return flags.FLAGS.dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')


def _check(results: dict[str, Any]) -> None:
  """Checks that outputs and gradients agree, relative to the largest of each."""
  for name, result in results.items():
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(results['reference']), strict=True):
      timing.check_equal(a, b, name, TOLERANCE[_dtype()])


def measure_mask(length: int, mask: Callable[[int], Visibility]) -> dict[str, dict[str, float]]:
  """Milliseconds, temporary bytes and both ratios of each implementation that runs here."""
  keys, B = jax.random.split(jax.random.key(0), 3), flags.FLAGS.batch
  N, K, H = map(int, flags.FLAGS.heads)
  q, k, v = (
    jax.random.normal(key, (B, length, heads, H)).astype(_dtype())
    for key, heads in zip(keys, (N, K, K))
  )
  visibility = jax.tree.map(lambda x: jnp.repeat(x, B, 0), mask(length))
  inputs, hint, steps = (q, k, v, visibility), 'causal' if mask is causal else '', {}
  for name in ATTENTIONS:
    try:
      steps[name] = jax.jit(_step(name, hint)).lower(*inputs).compile()
    except UserError as error:
      print(f'{length} {mask.__name__}: {name} does not run here: {error}', flush=True)
  _check({name: step(*inputs) for name, step in steps.items()})
  calls = {n: lambda step=step: jax.block_until_ready(step(*inputs)) for n, step in steps.items()}
  seconds = timing.alternate(calls, flags.FLAGS.rounds)
  milliseconds = timing.medians(seconds)
  memory = {name: step.memory_analysis().temp_size_in_bytes for name, step in steps.items()}
  return {
    name: {
      'milliseconds': milliseconds[name],
      'temporary_bytes': memory[name],
      'time': timing.ratio(seconds, name, 'reference'),
      'memory': round(memory['reference'] / memory[name], 2),
    }
    for name in steps
  }


def measure() -> dict[str, Any]:
  """Measures every mask at every length."""
  cases = {
    f'{mask.__name__}/{length}': measure_mask(int(length), mask)
    for length in flags.FLAGS.lengths
    for mask in (causal, mixture)
  }
  ratios = {
    f'{metric}/{name}/{case}': figures[metric]
    for case, implementations in cases.items()
    for name, figures in implementations.items()
    for metric in ('time', 'memory')
    if name != 'reference'
  }
  shape = {'batch': flags.FLAGS.batch, 'heads': flags.FLAGS.heads, 'dtype': _dtype()}
  return {'ratios': ratios, 'shape': shape, 'cases': cases}


if __name__ == '__main__':
  timing.main(measure)
