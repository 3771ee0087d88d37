"""One training step of a Mixture-of-Transformers against its own matrix products, and PyTorch.

  python -m tests.benchmarks.train_step --json=train_step.json

Two experts of 8 layers of width 512, float32: forward, backward and AdamW. `ratios.of_products` is
the share of the rate at which XLA runs the step's own matrix products alone (same shapes);
`ratios.eager` and `ratios.compiled` are speeds relative to PyTorch's transformers modules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags

from tests.benchmarks import timing
from tests.benchmarks.torch_mot import Mot
from vpe_jax.config import OptimConfig
from vpe_jax.contracts import Array, Params, Visibility, visible
from vpe_jax.models import mot
from vpe_jax.models.transformer import Layer, TransformerConfig
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.spans import Layout, Span
from vpe_jax.training import optimizer

CONFIG = TransformerConfig(width=512, mlp=1408, layers=8, heads=8, kv_heads=2, head_width=64)
BATCH, LENGTHS = 4, {'ar': 160, 'dit': 256}
OPTIM = OptimConfig(lr=1e-4, warmup=1, clip=0.0)
flags.DEFINE_bool('compiled', True, "whether to measure torch.compile's step too")


def _visibility() -> dict[str, Visibility]:
  """Visibility of causal tokens, and of an image that sees them and itself."""
  text, image = Span('text', LENGTHS['ar'], 'ar'), Span('image', LENGTHS['dit'], 'dit', full=True)
  regions = build(Layout((text, image)), keep=jnp.ones((BATCH,), bool))
  return {name: region.visibility for name, region in regions.items()}


def _step(visibility: dict[str, Visibility]) -> Callable[..., Any]:
  layers = {name: Layer(CONFIG, jnp.float32) for name in LENGTHS}

  def loss(params: Params, inputs: dict[str, Array]) -> Array:
    streams = {n: mot.Stream(inputs[n], visibility[n].order, visibility[n]) for n in LENGTHS}
    unstacked = {name: mot.unstack(params[name]) for name in LENGTHS}
    hidden, _ = mot.run(layers, unstacked, streams)
    return sum(jnp.sum(jnp.square(x)) for x in hidden.values()) / BATCH

  def step(params: Params, state: Any, inputs: dict[str, Array], count: Array) -> Any:
    value, gradient = jax.value_and_grad(loss)(params, inputs)
    params, state = optimizer.update(gradient, state, params, count, OPTIM)
    return params, state, value

  return jax.jit(step, donate_argnums=(0, 1))


def products() -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
  """Shapes and einsum of every matrix product of one layer's forward and backward pass."""
  c, total, pairs = CONFIG, sum(LENGTHS.values()), []
  for length in LENGTHS.values():
    tokens = BATCH * length
    heads = c.heads * c.head_width
    kv = c.kv_heads * c.head_width
    dense = [(c.width, heads), (c.width, kv), (c.width, kv), (heads, c.width)]
    dense += [(c.width, c.mlp), (c.width, c.mlp), (c.mlp, c.width)]
    for width_in, width_out in dense:
      pairs.append(((tokens, width_in), (width_in, width_out), 'rk,km->rm'))
      pairs.append(((tokens, width_out), (width_in, width_out), 'rm,km->rk'))
      pairs.append(((tokens, width_in), (tokens, width_out), 'rk,rm->km'))
  # All queries of a group share one product: logits and mixed values, and two gradients each.
  queries = total * c.heads // c.kv_heads
  q, k, p = ((BATCH, c.kv_heads, n, m) for n, m in (
    (queries, c.head_width), (total, c.head_width), (queries, total)))  # fmt: skip
  pairs += [(q, k, 'bnlh,bnsh->bnls'), (p, k, 'bnls,bnsh->bnlh')]  # forward
  pairs += [(q, k, 'bnlh,bnsh->bnls'), (p, q, 'bnls,bnlh->bnsh')]  # of the values
  pairs += [(p, k, 'bnls,bnsh->bnlh'), (p, q, 'bnls,bnlh->bnsh')]  # of q and k
  return pairs


def _products_alone() -> Callable[[], Any]:
  jobs, rng = products(), np.random.default_rng(0)
  arrays = [tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (a, b))
            for a, b, _ in jobs]  # fmt: skip
  run = jax.jit(lambda pairs: [jnp.einsum(spec, *pair) for (_, _, spec), pair in zip(jobs, pairs)])

  def call() -> None:
    for _ in range(CONFIG.layers):
      jax.block_until_ready(run(arrays))

  return call


def flops() -> float:
  """FLOPs of the matrix products of one step."""
  total = 0
  for a, b, spec in products():
    sizes = dict(zip(spec.replace('->', ',').replace(',', ''), (*a, *b)))
    total += 2 * int(np.prod([sizes[axis] for axis in set(spec) - set(',->')]))
  return float(CONFIG.layers * total)


def _torch_step(model: Mot, inputs: dict[str, torch.Tensor], compiled: bool) -> Callable[[], float]:
  optim = torch.optim.AdamW(
    model.parameters(), OPTIM.lr, (OPTIM.b1, OPTIM.b2), OPTIM.eps, weight_decay=0.0
  )
  forward = torch.compile(model) if compiled else model

  def call() -> float:
    optim.zero_grad(set_to_none=True)
    loss = sum(x.square().sum() for x in forward(inputs).values()) / BATCH
    loss.backward()
    optim.step()
    return loss.item()

  return call


def measure() -> dict[str, Any]:
  """Measures all sides."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  visibility = _visibility()
  keys = jax.random.split(jax.random.key(0), len(LENGTHS))
  layer = Layer(CONFIG, jnp.float32)
  params = {name: mot.init_layers(layer, key) for name, key in zip(LENGTHS, keys)}
  rng = np.random.default_rng(1)
  inputs = {n: rng.standard_normal((BATCH, L, CONFIG.width)).astype(np.float32)
            for n, L in LENGTHS.items()}  # fmt: skip
  whole = Visibility(*(jnp.concatenate([getattr(visibility[n], f) for n in LENGTHS], 1)
                       for f in ('order', 'since', 'reach', 'until')))  # fmt: skip
  mask = np.asarray(visible(whole, whole))
  kinds = ('eager', 'compiled') if flags.FLAGS.compiled else ('eager',)
  theirs = {}
  for kind in kinds:
    model = Mot(CONFIG, tuple(LENGTHS), mask)
    model.copy_weights(params)
    torch_inputs = {name: torch.tensor(x) for name, x in inputs.items()}
    theirs[kind] = _torch_step(model, torch_inputs, kind == 'compiled')
  step = _step(visibility)
  state = [params, optimizer.init(params), jnp.zeros((), jnp.int32)]

  def ours() -> float:
    state[0], state[1], loss = step(state[0], state[1], inputs, state[2])
    state[2] = state[2] + 1
    return float(loss)

  # Two steps: the second loss depends on the gradient and the update.
  losses = {name: [call(), call()] for name, call in {'ours': ours, **theirs}.items()}
  errors = {k: timing.check_equal(losses['ours'], losses[k], f'losses of {k}') for k in theirs}
  seconds = timing.alternate({'ours': ours, 'products': _products_alone(), **theirs})
  ratios = {'of_products': timing.ratio(seconds, 'ours', 'products')}
  ratios |= {kind: timing.ratio(seconds, 'ours', kind) for kind in theirs}
  best = timing.medians(seconds)
  rate = {name: round(flops() / value / 1e6, 1) for name, value in best.items()}
  return {'ratios': ratios, 'milliseconds': best, 'gflops_per_s': rate, 'errors': errors}


if __name__ == '__main__':
  timing.main(measure)
