"""Emu3.5's IBQ tokenizer, in the layout of VQGAN's code."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import pyramid


def _half(half: str, step: str) -> tuple[Row, ...]:
  """The encoder or decoder; the decoder's levels are numbered from full resolution."""
  level, middle = f'{half}.{step}.{{i}}', f'{half}.mid'
  return (
    *pyramid.ends(half, 'norm_out'),
    *pyramid.block(f'{level}.block.{{j}}', f'{half}/level_{{i}}/block_{{j}}'),
    *pyramid.attention(f'{level}.attn.{{j}}', f'{half}/level_{{i}}/attention_{{j}}'),
    *pyramid.conv(f'{level}.{step}sample.conv', f'{half}/{step}_{{i}}'),
    *pyramid.block(f'{middle}.block_1', f'{half}/middle/block_0'),
    *pyramid.attention(f'{middle}.attn_1', f'{half}/middle/attention'),
    *pyramid.block(f'{middle}.block_2', f'{half}/middle/block_1'),
  )


LAYOUTS = (
  Table(
    name='ibq (Emu3.5)',
    rows=(
      *_half('encoder', 'down'),
      *_half('decoder', 'up'),
      *pyramid.quant(),
      Row('quantize.embedding.weight', 'codebook'),
    ),
  ),
)
