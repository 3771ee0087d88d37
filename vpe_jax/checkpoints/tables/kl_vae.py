"""KL autoencoders of latent diffusion (diffusers' AutoencoderKL)."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import pyramid, rows

_SHORTCUT = 'conv_shortcut'


def _attention(source: str, target: str, names: tuple[str, ...]) -> tuple[Row, ...]:
  layers = (rows.dense(f'{source}.{a}', f'{target}/{b}') for a, b in zip(names, 'qkvo'))
  norm = rows.layer_norm(f'{source}.group_norm', f'{target}/norm')
  return (*norm, *(row for layer in layers for row in layer))


def _half(half: str, step: str, change: str, names: tuple[str, ...]) -> tuple[Row, ...]:
  """The encoder or decoder.

  Args:
    half: `encoder` or `decoder`.
    step: `down` or `up`.
    change: the source's name of the layer that changes the resolution.
    names: the source's names of q, k, v and o.
  """
  level, middle = f'{half}.{step}_blocks.{{i}}', f'{half}.mid_block'
  return (
    *pyramid.ends(half, 'conv_norm_out'),
    *pyramid.block(f'{level}.resnets.{{j}}', f'{half}/level_{{i}}/block_{{j}}', _SHORTCUT),
    *pyramid.conv(f'{level}.{change}.0.conv', f'{half}/{step}_{{i}}'),
    *pyramid.block(f'{middle}.resnets.{{j}}', f'{half}/middle/block_{{j}}', _SHORTCUT),
    *_attention(f'{middle}.attentions.0', f'{half}/middle/attention', names),
  )


def _table(name: str, names: tuple[str, ...]) -> Table:
  """A layout; `names` are the source's names of q, k, v and o."""
  return Table(
    name=name,
    rows=(
      *_half('encoder', 'down', 'downsamplers', names),
      *_half('decoder', 'up', 'upsamplers', names),
      *pyramid.quant(),
    ),
  )


LAYOUTS = (
  _table('kl_vae (diffusers)', ('to_q', 'to_k', 'to_v', 'to_out.0')),
  # Files of older diffusers versions, such as those of Stable Diffusion 1 and 2.
  _table('kl_vae (diffusers before 0.17)', ('query', 'key', 'value', 'proj_attn')),
)
