"""Baseline of the train-step benchmark: a Mixture-of-Transformers of Qwen2 modules in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
import torch
from torch import nn
from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from vpe_jax.contracts import Params
from vpe_jax.models.transformer import TransformerConfig


class Expert(nn.Module):
  """Parameters of one expert in a layer: projections, norms and MLP."""

  def __init__(self, config: TransformerConfig):
    super().__init__()
    c = config
    theirs = Qwen2Config(hidden_size=c.width, intermediate_size=c.mlp, hidden_act='silu')
    self.heads = (c.heads, c.kv_heads, c.head_width)
    self.attention_norm = qwen2.Qwen2RMSNorm(c.width, c.eps)
    self.q = nn.Linear(c.width, c.heads * c.head_width)
    self.k = nn.Linear(c.width, c.kv_heads * c.head_width)
    self.v = nn.Linear(c.width, c.kv_heads * c.head_width)
    self.o = nn.Linear(c.heads * c.head_width, c.width, bias=False)
    self.mlp_norm = qwen2.Qwen2RMSNorm(c.width, c.eps)
    self.mlp = qwen2.Qwen2MLP(theirs)

  def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v [B, heads, L, H], rotated."""
    N, K, H = self.heads
    y = self.attention_norm(x)
    parts = zip((self.q, self.k, self.v), (N, K, K), strict=True)
    q, k, v = (linear(y).unflatten(-1, (n, H)).transpose(1, 2) for linear, n in parts)
    return [*qwen2.apply_rotary_pos_emb(q, k, cos, sin), v]

  def finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """The layer's output from its input and the mixed values [B, N, L, H]."""
    x = x + self.o(mixed.transpose(1, 2).flatten(2))
    return x + self.mlp(self.mlp_norm(x))


class Mot(nn.Module):
  """Layers of several experts joined by attention; positions and mask are fixed."""

  def __init__(self, config: TransformerConfig, names: tuple[str, ...], mask: np.ndarray):
    super().__init__()
    self.layers = nn.ModuleList(
      nn.ModuleDict({name: Expert(config) for name in names}) for _ in range(config.layers)
    )
    length = mask.shape[-1]
    freq = config.rope_theta ** (-np.arange(0, config.head_width, 2) / config.head_width)
    angle = np.arange(length)[:, None] * np.concatenate([freq, freq])
    table = lambda x: torch.tensor(x[None], dtype=torch.float32)
    self.register_buffer('cos', table(np.cos(angle)))
    self.register_buffer('sin', table(np.sin(angle)))
    self.register_buffer('mask', torch.tensor(mask)[:, None])

  def forward(self, streams: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hidden states of every expert, in and out [B, L, D]."""
    for layer in self.layers:
      start, projected = 0, []
      for name, x in streams.items():
        stop = start + x.shape[1]
        projected.append(layer[name].project(x, self.cos[:, start:stop], self.sin[:, start:stop]))
        start = stop
      q, k, v = (torch.cat(parts, 2) for parts in zip(*projected, strict=True))
      mixed = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=self.mask, enable_gqa=True
      )
      lengths = [x.shape[1] for x in streams.values()]
      pieces = dict(zip(streams, mixed.split(lengths, dim=2), strict=True))
      streams = {name: layer[name].finish(x, pieces[name]) for name, x in streams.items()}
    return streams

  def copy_weights(self, params: Mapping[str, Params]) -> None:
    """Copies our weights: per expert, layers stacked on a leading axis."""
    with torch.no_grad():
      for index, layer in enumerate(self.layers):
        for name, expert in layer.items():
          ours = jax.tree.map(lambda leaf, i=index: np.array(leaf[i]), params[name])
          _fill(expert, ours)


def _fill(expert: Expert, ours: Params) -> None:
  width = ours['attention_norm']['scale'].shape[0]
  linear = {name: getattr(expert, name) for name in ('q', 'k', 'v', 'o')}
  linear |= {name: getattr(expert.mlp, f'{name}_proj') for name in ('gate', 'up', 'down')}
  for name, module in linear.items():
    kernel = ours[name]['kernel']
    flat = kernel.reshape(-1, width) if name in ('o', 'down') else kernel.reshape(width, -1)
    module.weight.copy_(torch.tensor(np.ascontiguousarray(flat.T)))
    if 'bias' in ours[name]:
      module.bias.copy_(torch.tensor(ours[name]['bias'].reshape(-1)))
  for name in ('attention_norm', 'mlp_norm'):
    getattr(expert, name).weight.copy_(torch.tensor(ours[name]['scale']))
