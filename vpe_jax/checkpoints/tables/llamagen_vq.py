"""LlamaGen's VQ tokenizer (vq_ds16_c2i.pt, vq_ds8_c2i.pt)."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import pyramid


def _half(half: str, resample: str, step: str) -> tuple[Row, ...]:
  """The encoder or decoder.

  Args:
    half: `encoder` or `decoder`.
    resample: the source's name of the layer that changes the resolution.
    step: `down` or `up`, our name of that layer.
  """
  level, middle = f'{half}.conv_blocks.{{i}}', f'{half}.mid'
  return (
    *pyramid.ends(half, 'norm_out'),
    *pyramid.block(f'{level}.res.{{j}}', f'{half}/level_{{i}}/block_{{j}}'),
    *pyramid.attention(f'{level}.attn.{{j}}', f'{half}/level_{{i}}/attention_{{j}}'),
    *pyramid.conv(f'{level}.{resample}.conv', f'{half}/{step}_{{i}}'),
    *pyramid.block(f'{middle}.0', f'{half}/middle/block_0'),
    *pyramid.attention(f'{middle}.1', f'{half}/middle/attention'),
    *pyramid.block(f'{middle}.2', f'{half}/middle/block_1'),
  )


LAYOUTS = (
  Table(
    name='llamagen_vq (LlamaGen)',
    rows=(
      *_half('encoder', 'downsample', 'down'),
      *_half('decoder', 'upsample', 'up'),
      *pyramid.quant(),
      Row('quantize.embedding.weight', 'codebook'),
    ),
    ignored=((r'quantize\.codebook_used', 'the latest codes in training, to log their usage'),),
  ),
)
