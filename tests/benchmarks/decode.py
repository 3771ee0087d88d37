"""Cached decoding of 576 tokens against transformers' generate, and the weight-read floor.

  python -m tests.benchmarks.decode --json=decode.json

Greedy, float32, vocabulary 16,384, at 8 layers of width 512 and at the Qwen2.5-0.5B body, batch 1
and 8. `ratios` are speeds relative to `generate`; `of_floor` is the share of the rate at which the
weights alone can be read from memory, `of_products` that of the rate at which XLA runs a step's
matrix products alone (both measured in the same run).
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from transformers import Qwen2ForCausalLM

from tests.benchmarks import timing
from vpe_jax.checkpoints import families
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models import kernel_layout, mot
from vpe_jax.models.decoder import Decoder, DecoderConfig
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.ops.matmul import matmul_transposed
from vpe_jax.sampling import autoregressive
from vpe_jax.sampling.guidance import UNGUIDED
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sampling.settings import TokenSampling
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import causal_text
from vpe_jax.sharding import leaves_by_path

VOCABULARY, PROMPT, TOKENS = 16_384, 32, 576
BODIES = {
  'small': TransformerConfig(width=512, mlp=1408, layers=8, heads=8, kv_heads=2, head_width=64),
  'qwen2.5-0.5b': TransformerConfig(
    width=896, mlp=4864, layers=24, heads=14, kv_heads=2, head_width=64
  ),
}
flags.DEFINE_list('bodies', list(BODIES), 'bodies to measure')
flags.DEFINE_list('batches', ['1', '8'], 'batch sizes')
flags.DEFINE_integer('rounds', 3, 'timed rounds')


def decoder(body: TransformerConfig) -> Decoder:
  """The language model with a body."""
  return Decoder(DecoderConfig(VOCABULARY, body, tied=True, context=PROMPT + TOKENS))


def random_params(model: Decoder) -> Params:
  """Random weights whose greedy continuation doesn't repeat one token."""
  params = model.init(jax.random.key(0))
  params['embed'] = params['embed'] * 5  # Logits differ enough not to tie.
  return params


def generate(model: Decoder, params: Params, prompt: Array) -> Array:
  """Codes [B, TOKENS] after prompts [B, PROMPT]: prefill, then a step per token, all on device."""
  batch, length = prompt.shape[0], PROMPT + TOKENS
  text = build(causal_text(length), keep=jnp.ones((batch,), bool))['text']
  positions, key = text.positions, text.visibility
  cache = mot.empty_cache(model.layer, params['layers'], key, model.dtype)

  def run(ids: Array, cache: mot.Cache, at: Array | int) -> Prefix:
    cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, ids.shape[1], 1)
    stream = mot.Stream(model.embed(params, ids), cut(positions), jax.tree.map(cut, key))
    hidden, cache = model.states(params, stream, cache, at)
    return Prefix(cache, model.logits(params, hidden[:, -1:])[:, 0])

  feed = lambda prefix, tokens, index: run(tokens[:, None], prefix.cache, PROMPT + index)
  keys = jax.random.split(jax.random.key(0), batch)
  settings = TokenSampling(temperature=0.0, min_p=0.0)
  sample = autoregressive.categorical(lambda logits: logits, settings, UNGUIDED, UNGUIDED.branches)
  return autoregressive.generate(feed, run(prompt, cache, 0), TOKENS, keys, sample)[0]


def peer(model: Decoder, params: Params) -> Qwen2ForCausalLM:
  """transformers' model with our weights, which are exported and loaded."""
  with tempfile.TemporaryDirectory() as folder:
    families.save('qwen2', model.config, params, Path(folder) / 'model')
    return Qwen2ForCausalLM.from_pretrained(
      Path(folder) / 'model', attn_implementation='sdpa', dtype=torch.float32
    ).eval()


def read_floor(params: Params) -> Callable[[], Any]:
  """A call that reads every weight once per decoded token, and does nothing else."""
  flat = jnp.arange(sum(leaf.size for leaf in jax.tree.leaves(params)), dtype=jnp.float32)

  # Weights are an argument, and the maximum depends on every step, so XLA omits and moves no read.
  @jax.jit
  def run(flat: Array) -> Array:
    once = lambda _, top: jnp.maximum(top, jnp.max(jax.lax.optimization_barrier((flat, top))[0]))
    return jax.lax.fori_loop(0, TOKENS, once, jnp.float32(0))

  return lambda: run(flat).block_until_ready()


def products(params: Params, batch: int) -> Callable[[], Any]:
  """A call that multiplies activations by every matrix once per decoded token."""
  body = [
    leaf.reshape(leaf.shape[0] if path.startswith('o/') else math.prod(leaf.shape[:-1]), -1)
    for layer in params['layers']
    for path, leaf in leaves_by_path(layer).items()
    if path.endswith(kernel_layout.TRANSPOSED)
  ]
  widths = {kernel.shape[1] for kernel in body}
  random = lambda width: jax.random.normal(jax.random.key(width), (batch, width))
  activations = {width: random(width) for width in widths}

  # Each product depends on the previous one, as in a layer.
  @jax.jit
  def run(body: list[Array], table: Array, inputs: dict[int, Array]) -> Array:
    def step(_: Array, last: Array) -> Array:
      for kernel in body:
        last = jnp.tanh(jnp.max(matmul_transposed(inputs[kernel.shape[1]] + last, kernel)))
      return jnp.tanh(jnp.max(matmul_transposed(inputs[table.shape[1]] + last, table)))

    return jax.lax.fori_loop(0, TOKENS, step, jnp.float32(0))

  return lambda: run(body, params['embed'], activations).block_until_ready()


def measure_body(name: str, batch: int) -> dict[str, Any]:
  """Measures all sides for one body and batch size."""
  model = decoder(BODIES[name])
  params = random_params(model)
  theirs = peer(model, params)
  unstacked = params | {'layers': mot.unstack(params['layers'])}
  fast = kernel_layout.for_decoding(unstacked, 'cpu')
  prompt = np.random.default_rng(0).integers(0, VOCABULARY, (batch, PROMPT)).astype(np.int32)
  run = jax.jit(functools.partial(generate, model))
  torch_prompt = torch.tensor(prompt, dtype=torch.long)
  fixed = {'do_sample': False, 'min_new_tokens': TOKENS, 'max_new_tokens': TOKENS}
  fixed |= {'pad_token_id': 0, 'eos_token_id': -1}
  mask = torch.ones_like(torch_prompt)

  def reference() -> np.ndarray:
    with torch.no_grad():
      ids = theirs.generate(torch_prompt, attention_mask=mask, **fixed)
    return ids[:, PROMPT:].numpy()

  ours = lambda: np.asarray(run(fast, prompt))
  agreement = float(np.mean(ours() == reference()))
  if agreement < 1.0:
    raise UserError(f'{name}, batch {batch}: only {agreement:.1%} of the tokens agree')
  bounds = {'products': products(fast, batch), 'read_floor': read_floor(params)}
  sides = {'ours': ours, 'generate': reference, **bounds}
  seconds = timing.alternate(sides, flags.FLAGS.rounds)
  step = {side: round(value / TOKENS, 3) for side, value in timing.medians(seconds).items()}
  return {
    'ratio': timing.ratio(seconds, 'ours', 'generate'),
    'of_products': timing.ratio(seconds, 'ours', 'products'),
    'of_floor': timing.ratio(seconds, 'ours', 'read_floor'),
    'milliseconds_a_step': step,
  }


def measure() -> dict[str, Any]:
  """Measures every body at every batch size."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  cases = [(body, int(batch)) for body in flags.FLAGS.bodies for batch in flags.FLAGS.batches]
  results = {}
  for body, batch in cases:
    results[f'{body} x {batch}'] = measure_body(body, batch)
    print(f'{body} x {batch}:', results[f'{body} x {batch}'], flush=True)
  return {'ratios': {name: case['ratio'] for name, case in results.items()}, 'cases': results}


if __name__ == '__main__':
  timing.main(measure)
