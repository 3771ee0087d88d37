"""Released generators in torch: networks and samplers written from their papers' equations.

The networks take the tensors of the golden weights by their published names; tests compare them
with the golden outputs of the original code. The samplers take their random numbers as arguments.
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = pathlib.Path(__file__).parent / 'golden'
VOCABULARY, BOS, BOI = 1024, 2, 5  # of the shipped tokenizer
EOI, EOS = 6, 7


def show_o2_folder(folder: pathlib.Path) -> pathlib.Path:
  """The golden Show-o2 with a row of text embeddings for each token of the shipped tokenizer."""
  shutil.copytree(GOLDEN / 'showo2', folder)
  weights = safetensors.torch.load_file(folder / 'model.safetensors')
  name = 'showo.model.embed_tokens.weight'
  table = weights[name]
  generator = torch.Generator().manual_seed(0)
  more = torch.randn(VOCABULARY - len(table), table.shape[1], generator=generator)
  weights[name] = torch.cat([table, table.std() * more])
  safetensors.torch.save_file(weights, folder / 'model.safetensors')
  ids = {'vocab_size': VOCABULARY, 'bos_token_id': BOS, 'boi_token_id': BOI}
  _change_json(folder / 'config.json', ids)
  return folder


def llamagen_vq_folder(folder: pathlib.Path, codes: int) -> pathlib.Path:
  """The golden VQ tokenizer with the first entries of its codebook."""
  shutil.copytree(GOLDEN / 'llamagen_vq', folder)
  weights = safetensors.torch.load_file(folder / 'model.safetensors')
  name = 'quantize.embedding.weight'
  weights[name] = weights[name][:codes].clone()
  safetensors.torch.save_file(weights, folder / 'model.safetensors')
  _change_json(folder / 'config.json', {'codebook_size': codes})
  return folder


def _change_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(fields)))


class _Network:
  """Tensors and sizes of a folder of published weights."""

  def __init__(self, folder: pathlib.Path):
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    self.weights = {name: tensor.float() for name, tensor in weights.items()}
    self.sizes = json.loads((folder / 'config.json').read_text())

  def linear(self, name: str, x: Tensor) -> Tensor:
    return F.linear(x, self.weights[f'{name}.weight'], self.weights.get(f'{name}.bias'))

  def rms(self, name: str, x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.weights[f'{name}.weight']

  def layer_norm(self, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(
      x, x.shape[-1:], self.weights[f'{name}.weight'], self.weights[f'{name}.bias'], 1e-6
    )

  def swiglu(self, names: Sequence[str], x: Tensor) -> Tensor:
    gate, up, down = names
    return self.linear(down, F.silu(self.linear(gate, x)) * self.linear(up, x))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
  """Attention of [L, heads, width] with shared key/value heads; `mask` is True where visible."""
  groups = q.shape[1] // k.shape[1]
  k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
  logits = torch.einsum('LNH,SNH->NLS', q, k) / math.sqrt(q.shape[-1])
  if mask is not None:
    logits = logits.masked_fill(~mask, -math.inf)
  return torch.einsum('NLS,SNH->LNH', logits.softmax(-1), v).flatten(1)


def _rotate_half(x: Tensor, frequencies: Tensor) -> Tensor:
  """RoPE of [L, heads, width] at positions 0 .. L - 1; pairs are half a width apart."""
  angles = torch.arange(len(x))[:, None] * frequencies
  cos, sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))
  first, second = x.chunk(2, -1)
  return x * cos + torch.cat([-second, first], -1) * sin


class ShowO2(_Network):
  """Show-o2 (arXiv 2506.15564): the velocity (data minus noise) at time 0 (noise) to 1 (data)."""

  def velocity(self, ids: Tensor, span: tuple[int, int], x: Tensor, time: float) -> Tensor:
    """Velocity [C, h, w] of noisy latents of that shape.

    Args:
      ids: token ids [L]; those of the image's slots are not used.
      span: first slot of the image and number of slots: a time token, then the image's tokens.
      x: noisy latents.
      time: time of the latents.
    """
    start, length = span
    image = slice(start, start + length)
    c = self.sizes
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask[image, image] = True
    condition = self._time(time)
    h = F.embedding(ids, self.weights['showo.model.embed_tokens.weight']).clone()
    h[start] = self.linear('time_embed_proj', condition)
    h[start + 1 : start + length] = self._dual_path(x)
    shape = c['num_attention_heads'], c['num_key_value_heads']
    theta, eps = c.get('rope_theta', 1e6), 1e-6
    width = c['hidden_size'] // c['num_attention_heads']
    frequencies = theta ** (-torch.arange(0, width, 2) / width)
    for n in range(c['num_hidden_layers']):
      name = f'showo.model.layers.{n}'
      y = self.rms(f'{name}.input_layernorm', h, eps)
      h = h + self._self_attention(f'{name}.self_attn', y, shape, frequencies, mask)
      y = self.rms(f'{name}.post_attention_layernorm', h, eps)
      h = h + self.swiglu([f'{name}.mlp.{part}_proj' for part in ('gate', 'up', 'down')], y)
    h = self.rms('showo.model.norm', h, eps)
    return self._head(h, image, condition, mask).reshape(*x.shape[1:], -1).permute(2, 0, 1)

  def _time(self, time: float) -> Tensor:
    frequencies = torch.exp(-math.log(1e4) * torch.arange(128) / 128)
    wave = torch.cat([torch.cos(time * frequencies), torch.sin(time * frequencies)])
    return self.linear('time_embed.mlp.2', F.silu(self.linear('time_embed.mlp.0', wave)))

  def _dual_path(self, x: Tensor) -> Tensor:
    """Image tokens: SigLIP features and a linear embedding of 2 x 2 patches, fused."""
    embed = lambda name: F.conv2d(
      x[None], self.weights[f'{name}.proj.weight'], self.weights[f'{name}.proj.bias'], stride=2
    )[0]
    und, gen = embed('image_embedder_und'), embed('image_embedder_gen')
    table = self.weights['position_embedding.weight']
    side = math.isqrt(len(table))
    table = table.T.reshape(1, -1, side, side)
    if und.shape[1:] != (side, side):
      table = F.interpolate(table, und.shape[1:], mode='bicubic', align_corners=False)
    h = (und + table[0]).flatten(1).T
    heads = self.sizes['clip_heads']
    for n in range(self.sizes['clip_layers']):
      name = f'und_trans.layers.{n}'
      y = self.layer_norm(f'{name}.layer_norm1', h)
      q, k, v = (
        self.linear(f'{name}.self_attn.{part}_proj', y).unflatten(-1, (heads, -1)) for part in 'qkv'
      )
      h = h + self.linear(f'{name}.self_attn.out_proj', _attention(q, k, v, None))
      y = F.gelu(
        self.linear(f'{name}.mlp.fc1', self.layer_norm(f'{name}.layer_norm2', h)),
        approximate='tanh',
      )
      h = h + self.linear(f'{name}.mlp.fc2', y)
    both = self.rms('fusion_proj.0', torch.cat([h, gen.flatten(1).T], -1), 1e-6)
    return self.linear('fusion_proj.3', F.gelu(self.linear('fusion_proj.1', both)))

  def _self_attention(
    self, name: str, y: Tensor, heads: tuple[int, int], frequencies: Tensor, mask: Tensor
  ) -> Tensor:
    """Attention with RoPE; queries and keys are normalized where the weights have norms."""
    q, k, v = (
      self.linear(f'{name}.{part}_proj', y).unflatten(-1, (count, -1))
      for part, count in zip('qkv', (heads[0], heads[1], heads[1]))
    )
    if f'{name}.q_norm.weight' in self.weights:
      q, k = self.rms(f'{name}.q_norm', q, 1e-6), self.rms(f'{name}.k_norm', k, 1e-6)
    q, k = _rotate_half(q, frequencies), _rotate_half(k, frequencies)
    return self.linear(f'{name}.o_proj', _attention(q, k, v, mask))

  def _head(self, h: Tensor, image: slice, condition: Tensor, mask: Tensor) -> Tensor:
    """The flow head over the whole sequence: [image tokens, 4 C]."""
    c = self.sizes['head']
    y = self.linear('diff_proj.2', F.gelu(self.linear('diff_proj.0', h)))
    inside = torch.zeros(len(h), 1)
    inside[image] = 1.0
    modulated = lambda x, shift, scale: x * (1 + inside * scale) + inside * shift
    heads = c['num_attention_heads'], c['num_key_value_heads']
    frequencies = self._scaled_frequencies()
    for n in range(c['blocks']):
      name = f'diffusion_head_a.{n}'
      six = self.linear(f'{name}.adaLN_modulation.1', F.silu(condition)).chunk(6)
      shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
      gated = lambda gate: inside * gate + (1 - inside)
      x = modulated(self.rms(f'{name}.input_layernorm', y, 1e-5), shift_a, scale_a)
      attended = self._self_attention(f'{name}.self_attn', x, heads, frequencies, mask)
      y = y + gated(gate_a) * attended
      x = modulated(self.rms(f'{name}.post_attention_layernorm', y, 1e-5), shift_m, scale_m)
      parts = [f'{name}.mlp.{part}_proj' for part in ('gate', 'up', 'down')]
      y = y + gated(gate_m) * self.swiglu(parts, x)
    shift, scale = self.linear('diffusion_head_b.adaLN_modulation.1', F.silu(condition)).chunk(2)
    y = modulated(self.rms('diffusion_head_b.norm_final', y, 1e-6), shift, scale)
    return self.linear('diffusion_head_b.linear', y)[image][1:]

  def _scaled_frequencies(self) -> Tensor:
    """RoPE frequencies with the scaling of Llama 3."""
    c, s = self.sizes['head'], self.sizes['head']['rope_scaling']
    frequencies = c['rope_theta'] ** (-torch.arange(0, c['head_dim'], 2) / c['head_dim'])
    turns = s['original_max_position_embeddings'] * frequencies / (2 * math.pi)
    low, high = s['low_freq_factor'], s['high_freq_factor']
    mix = ((turns - low) / (high - low)).clamp(0, 1)
    return mix * frequencies + (1 - mix) * frequencies / s['factor']

  def sample(
    self, text: Sequence[int], noise: Tensor, points: int, shift: float, guidance: float
  ) -> Tensor:
    """Latents [C, h, w] of a prompt, by Euler steps between `points` times.

    The sequence is `[bos] text [boi] time image [eoi] [eos]`; that of the null prompt has no text.
    """
    tokens = noise.shape[1] * noise.shape[2] // 4 + 1
    uniform = torch.linspace(0, 1, points, dtype=torch.float64)
    times = (uniform / (uniform + shift - shift * uniform)).tolist()

    def velocity(prompt: Sequence[int], x: Tensor, time: float) -> Tensor:
      ids = torch.tensor([BOS, *prompt, BOI, *[0] * tokens, EOI, EOS])
      return self.velocity(ids, (len(prompt) + 2, tokens), x, time)

    x = noise
    for time, following in zip(times[:-1], times[1:]):
      null = velocity([], x, time)
      x = x + (following - time) * (null + guidance * (velocity(text, x, time) - null))
    return x


class LlamaGen(_Network):
  """LlamaGen's class-conditional GPT (arXiv 2406.06525)."""

  def logits(self, label: int, codes: Sequence[int]) -> Tensor:
    """Logits [1 + L, V] that follow the class and each of its L codes."""
    c, w = self.sizes, self.weights
    table = w['tok_embeddings.weight'][torch.tensor(list(codes), dtype=torch.long)]
    h = torch.cat([w['cls_embedding.embedding_table.weight'][label][None], table])
    mask = torch.ones(len(h), len(h), dtype=torch.bool).tril()
    heads, eps = c['n_head'], c['norm_eps']
    for n in range(c['n_layer']):
      y = self.rms(f'layers.{n}.attention_norm', h, eps)
      q, k, v = self.linear(f'layers.{n}.attention.wqkv', y).unflatten(-1, (3, heads, -1)).unbind(1)
      attended = _attention(self._rotated(q), self._rotated(k), v, mask)
      h = h + self.linear(f'layers.{n}.attention.wo', attended)
      y = self.rms(f'layers.{n}.ffn_norm', h, eps)
      h = h + self.swiglu([f'layers.{n}.feed_forward.w{i}' for i in (1, 3, 2)], y)
    return self.linear('output', self.rms('norm', h, eps))

  def _rotated(self, x: Tensor) -> Tensor:
    """2-D RoPE of [L, heads, width]: rows in the first pairs, columns in the others; class: 0."""
    side, half = math.isqrt(self.sizes['block_size']), x.shape[-1] // 2
    frequencies = self.sizes['rope_base'] ** (-torch.arange(0, half, 2) / half)
    cell = torch.arange(len(x) - 1)
    angles = torch.cat(
      [(cell // side)[:, None] * frequencies, (cell % side)[:, None] * frequencies], -1
    )
    unit = torch.polar(torch.ones_like(angles), angles)
    unit = torch.cat([torch.zeros(1, half, dtype=unit.dtype), unit])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * unit[:, None]).flatten(-2)

  def sample(
    self,
    label: int,
    choose: Callable[[int, np.ndarray], int],
    guidance: float,
    temperature: float,
    top_k: int,
  ) -> list[int]:
    """The codes of an image, one by one, each with the whole sequence before it.

    `choose(index, log_probabilities)` samples a code.
    """
    codes: list[int] = []
    for index in range(self.sizes['block_size']):
      wanted = self.logits(label, codes)[-1]
      null = self.logits(self.sizes['num_classes'], codes)[-1]
      logits = (null + (wanted - null) * guidance) / temperature
      least = logits.topk(min(top_k, len(logits))).values[-1]
      logits = logits.masked_fill(logits < least, -math.inf)
      codes.append(choose(index, logits.log_softmax(-1).numpy()))
    return codes
