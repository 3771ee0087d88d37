"""The network of edits, written by hand: sequence, clocks, dual paths, modulation (App. C, D).

`[bos] [boi] time x_src [eoi] text [bot] s [eot] [boi] time x`, one example at a time, in numpy and
float64. Both images have a time token, an own dual path and a modulation of the head; the source
image's clock is 1, as it is clean. The AR expert processes all but the last time token and x.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import edit
from tests.small_systems import encoded_examples, host_params, with_inputs
from vpe_jax import systems
from vpe_jax.contracts import Params

BOS, BOI, EOI, BOT, EOT = 2, 5, 6, 1024 + 512, 1024 + 513
CLOCK = 0.3  # of the generated image


@pytest.fixture(scope='module')
def system():
  config = edit.get_config('debug,arch=internal')
  config.data.update(source='synthetic', encode='cached', text_length=5)
  config.model.dual_path.encoder.layers = config.model.head.layers = 1
  return systems.build(config.to_dict())


@pytest.fixture(scope='module')
def params(system):
  return host_params(system)


@pytest.fixture(scope='module')
def example(system):
  """One example with a caption of full length."""
  batch = encoded_examples(system, 1)
  text, entries = batch.inputs['text'], batch.encoded
  return text, entries['visual_prompt'], entries['source_latents'], entries['latents']


def _rms(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def _layer_norm(x, weights):
  centred = x - x.mean(-1, keepdims=True)
  normed = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6)
  return normed * weights['scale'] + weights['bias']


def _dense(x, weights):
  return x @ weights['kernel'] + weights.get('bias', 0)


def _silu(x):
  return x / (1 + np.exp(-x))


def _gelu(x):
  return np.asarray(jax.nn.gelu(jnp.asarray(x), approximate=False), np.float64)


def _gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _project(x, weights):
  """Heads [N, L, H] of tokens [L, D]."""
  heads = np.einsum('ld,dnh->nlh', x, weights['kernel'])
  return heads + weights['bias'][:, None] if 'bias' in weights else heads


def _attend(q, k, v, mask):
  """Mixed values [N, L, H]; key/value heads are repeated."""
  repeats = q.shape[0] // k.shape[0]
  k, v = np.repeat(k, repeats, 0), np.repeat(v, repeats, 0)
  scores = np.where(mask, np.einsum('nlh,nsh->nls', q, k) / np.sqrt(q.shape[-1]), -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum('nls,nsh->nlh', weights / weights.sum(-1, keepdims=True), v)


def _rotated(x, theta, stretched=False):
  """Heads [N, L, H] rotated by their index in the sequence; channel i pairs with i + H / 2."""
  H = x.shape[-1]
  frequency = theta ** (-np.arange(0, H, 2) / H)
  if stretched:  # Llama 3: factor 32, from 1 to 4 wavelengths in 8,192 positions
    blend = np.clip((8192 * frequency / (2 * np.pi) - 1) / 3, 0, 1)
    frequency = (1 - blend) * frequency / 32 + blend * frequency
  angle = np.arange(x.shape[1])[:, None] * frequency
  first, second = np.split(x, 2, -1)
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _time(params, clock):
  """Condition of the head and time token of a clock."""
  weights = params['dit']['head']['time']
  angle = clock * np.exp(-np.log(1e4) * np.arange(128) / 128)
  waves = np.concatenate([np.cos(angle), np.sin(angle)])
  condition = _dense(_silu(_dense(waves, weights['in'])), weights['out'])
  return condition, _dense(condition, weights['token'])


def _dual_path(weights, latents):
  """Image tokens [P, D] of latents [h, w, C] in patches of 2 x 2."""
  h, w, C = latents.shape
  patches = latents.reshape(h // 2, 2, w // 2, 2, C).transpose(0, 2, 1, 3, 4).reshape(-1, 4 * C)
  ends, layer = weights['ends'], jax.tree.map(lambda leaf: leaf[0], weights['encoder'])
  x = _dense(patches, ends['und']) + ends['positions']
  y = _layer_norm(x, layer['attention_norm'])
  q, k, v = (_project(y, layer['attention'][name]) for name in 'qkv')
  o = layer['attention']['o']
  x = x + np.einsum('nlh,nhd->ld', _attend(q, k, v, True), o['kernel']) + o['bias']
  y = _layer_norm(x, layer['mlp_norm'])
  x = x + _dense(_gelu_tanh(_dense(y, layer['mlp']['up'])), layer['mlp']['down'])
  both = np.concatenate([x, _dense(patches, ends['gen'])], -1)
  both = _rms(both, ends['fusion_norm']['scale'], 1e-6)
  return _dense(_gelu(_dense(both, ends['fusion_in'])), ends['fusion_out'])


def _by_expert(image, function, ar, dit):
  """`function` of the AR expert's weights, or of the diffusion expert's where `image`."""
  return np.where(image[:, None], function(dit), function(ar))


def _body(params, x, image, mask):
  """Hidden states after the final norm of each token's expert."""
  experts = params['ar'], params['dit']
  for i in range(2):
    ar, dit = (jax.tree.map(lambda leaf, i=i: leaf[i], expert['layers']) for expert in experts)
    pick = lambda function, ar=ar, dit=dit: _by_expert(image, function, ar, dit)
    y = pick(lambda w, x=x: _rms(x, w['attention_norm']['scale'], 1e-6))
    q, k, v = (pick(lambda w, n=n, y=y: _project(y, w[n])) for n in 'qkv')
    mixed = _attend(_rotated(q, 1e6), _rotated(k, 1e6), v, mask)
    x = x + pick(lambda w, m=mixed: np.einsum('nlh,nhd->ld', m, w['o']['kernel']))
    y = pick(lambda w, x=x: _rms(x, w['mlp_norm']['scale'], 1e-6))
    swiglu = lambda w, y=y: _dense(_silu(_dense(y, w['gate'])) * _dense(y, w['up']), w['down'])
    x = x + pick(swiglu)
  norms = (expert['norm'] for expert in experts)
  return _by_expert(image, lambda w: _rms(x, w['scale'], 1e-6), *norms)


def _head(params, hidden, mask, modulation):
  """Output of the head's layer; `modulation` are six parts [L, width], without effect on text."""
  weights = params['dit']['head']
  y = _dense(_gelu(_dense(hidden, weights['entry']['in'])), weights['entry']['out'])
  block = jax.tree.map(lambda leaf: leaf[0], weights['blocks'])
  shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
  z = _rms(y, block['attention_norm']['scale'], 1e-5) * (1 + scale_a) + shift_a
  q, k, v = (_project(z, block[name]) for name in 'qkv')
  q, k = (_rms(x, block[f'{n}_norm']['scale'], 1e-6) for n, x in (('q', q), ('k', k)))
  mixed = _attend(_rotated(q, 5e5, stretched=True), _rotated(k, 5e5, stretched=True), v, mask)
  y = y + gate_a * np.einsum('nlh,nhd->ld', mixed, block['o']['kernel'])
  z = _rms(y, block['mlp_norm']['scale'], 1e-5) * (1 + scale_m) + shift_m
  z = _dense(_silu(_dense(z, block['gate'])) * _dense(z, block['up']), block['down'])
  return y + gate_m * z


def _expected(params: Params, text, codes, source, latents) -> tuple[np.ndarray, np.ndarray]:
  """Hidden states of the AR expert [L, D] and velocity [h, w, C] (data minus noise)."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  table = np.concatenate([params['embed']['text'], params['embed']['codes']])
  conditions, tokens = zip(_time(params, 1.0), _time(params, CLOCK), strict=True)
  images = [
    np.concatenate([token[None], _dual_path(params[expert]['dual_path'], x)])
    for expert, token, x in (('ar', tokens[0], source), ('dit', tokens[1], latents))
  ]
  prompt = [EOI, *text, BOT, *(1024 + codes), EOT, BOI]
  x = np.concatenate([table[[BOS, BOI]], images[0], table[prompt], images[1]])
  # Which image a token belongs to: 0 the source, 1 the generated one, -1 none.
  lengths = (2, len(images[0]), len(prompt), len(images[1]))
  owner = np.repeat([-1, 0, -1, 1], lengths)
  mask = np.tri(len(x), dtype=bool) | ((owner[:, None] == owner) & (owner >= 0))
  hidden = _body(params, x, owner == 1, mask)
  modulation = np.zeros((6, len(x), 48))
  modulation[[2, 5]] = 1  # gates of tokens that are not modulated
  weights = params['dit']['head']['blocks']['modulation']['out']
  weights = jax.tree.map(lambda leaf: leaf[0], weights)
  for image, condition in enumerate(conditions):
    parts = np.split(_dense(_silu(condition), weights), 6)
    modulation[:, owner == image] = np.stack(parts)[:, None]
  out = _head(params, hidden, mask, modulation)[owner == 1][1:]
  last = params['dit']['head']['exit']
  shift, scale = np.split(_dense(_silu(conditions[1]), last['modulation']['out']), 2)
  out = _dense(_rms(out, last['norm']['scale'], 1e-6) * (1 + scale) + shift, last['out'])
  side, C = 8, latents.shape[-1]
  image = out.reshape(side, side, 2, 2, C).transpose(0, 2, 1, 3, 4)
  return hidden[owner != 1], image.reshape(2 * side, 2 * side, C)


def _actual(system, params: Params, example: tuple[Any, ...]) -> tuple[Any, Any]:
  vocabulary = system.experts.ar.vocabulary
  assert (vocabulary.bos, vocabulary.boi, vocabulary.eoi) == (BOS, BOI, EOI)
  assert (vocabulary.bot, vocabulary.eot) == (BOT, EOT)
  text, codes, source, latents = example
  full = jnp.full((1,), text.shape[1], jnp.int32)
  batch = with_inputs(encoded_examples(system, 1), text=text, text_length=full)
  keep = {name: jnp.ones(1, bool) for name in ('prompt', 'source')}

  @jax.jit
  def run(params):
    regions = system.experts.regions(batch, codes, keep)
    return system.experts.forward(params, regions, (latents, jnp.full((1,), CLOCK)), source)

  return run(params)


def test_hidden_states_and_velocity_equal_those_written_by_hand(system, params, example):
  hidden, velocity = _actual(system, params, example)
  expected_hidden, expected_velocity = _expected(params, *(np.asarray(x)[0] for x in example))
  length = len(expected_hidden)
  for ours, theirs in ((hidden[0, :length], expected_hidden), (velocity[0], expected_velocity)):
    error = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
    assert error < 2e-5, f'relative error {error:.1e}'
