"""Rows for the layers of codecs/pyramid.py, with the names of VQGAN's code and its successors."""

from vpe_jax.checkpoints.table import Row
from vpe_jax.checkpoints.tables import rows

_POINTWISE = 'O I 1 1 -> I O'  # a 1x1 convolution, as a dense layer


def conv(source: str, target: str) -> tuple[Row, ...]:
  """A convolution's kernel and bias."""
  return rows.dense(source, target, 'O I p q -> p q I O')


def block(source: str, target: str, shortcut: str = 'nin_shortcut') -> tuple[Row, ...]:
  """A residual block; `shortcut` is the source's name of the 1x1 convolution on the skip path."""
  layers = (
    row
    for i in (1, 2)
    for row in (
      *rows.layer_norm(f'{source}.norm{i}', f'{target}/norm_{i}'),
      *conv(f'{source}.conv{i}', f'{target}/conv_{i}'),
    )
  )
  return (*layers, *conv(f'{source}.{shortcut}', f'{target}/shortcut'))


def attention(source: str, target: str) -> tuple[Row, ...]:
  """Attention with 1x1 convolutions as projections."""
  layers = (('q', 'q'), ('k', 'k'), ('v', 'v'), ('proj_out', 'o'))
  dense = (rows.dense(f'{source}.{a}', f'{target}/{b}', _POINTWISE) for a, b in layers)
  norm = rows.layer_norm(f'{source}.norm', f'{target}/norm')
  return (*norm, *(row for layer in dense for row in layer))


def ends(half: str, norm: str) -> tuple[Row, ...]:
  """First and last layers of encoder or decoder; `norm` is the source's name of the last norm."""
  return (
    *conv(f'{half}.conv_in', f'{half}/start'),
    *rows.layer_norm(f'{half}.{norm}', f'{half}/norm'),
    *conv(f'{half}.conv_out', f'{half}/end'),
  )


def quant() -> tuple[Row, ...]:
  """The 1x1 convolutions after the encoder and before the decoder."""
  return (*conv('quant_conv', 'quant'), *conv('post_quant_conv', 'post_quant'))
