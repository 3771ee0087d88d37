"""Wan 2.1's autoencoder for still images (import only).

The causal convolutions see two frames of zeros and then the image, so only their last slice in time
matters. Both layouts number the encoder's residual blocks and downsampling layers in one list.
"""

from vpe_jax.checkpoints.table import Row, Table

_LEVELS, _BLOCKS = 4, 2
_IGNORED = ((r'.*\.time_conv\.(weight|bias)', 'mixes frames; a still image has one'),)


def _causal(source: str, target: str) -> tuple[Row, ...]:
  """A causal convolution in time and space."""
  return (
    Row(f'{source}.weight', f'{target}/kernel', 'O I t p q -> p q I O', last='t'),
    Row(f'{source}.bias', f'{target}/bias'),
  )


def _conv(source: str, target: str, kernel: str = 'O I p q -> p q I O') -> tuple[Row, ...]:
  return (
    Row(f'{source}.weight', f'{target}/kernel', kernel),
    Row(f'{source}.bias', f'{target}/bias'),
  )


def _norm(source: str, target: str) -> tuple[Row, ...]:
  return (Row(f'{source}.gamma', f'{target}/scale', 'C 1 1 1 -> C'),)


def _block(source: str, target: str, names: tuple[str, ...]) -> tuple[Row, ...]:
  """A residual block; `names` are the source's names of its layers in the order below."""
  return (
    *_norm(f'{source}.{names[0]}', f'{target}/norm_1'),
    *_causal(f'{source}.{names[1]}', f'{target}/conv_1'),
    *_norm(f'{source}.{names[2]}', f'{target}/norm_2'),
    *_causal(f'{source}.{names[3]}', f'{target}/conv_2'),
    *_causal(f'{source}.{names[4]}', f'{target}/shortcut'),
  )


def _attention(source: str, target: str) -> tuple[Row, ...]:
  paths = tuple(tuple(f'{target}/{name}/{leaf}' for name in 'qkv') for leaf in ('kernel', 'bias'))
  return (
    Row(f'{source}.norm.gamma', f'{target}/norm/scale', 'C 1 1 -> C'),
    Row(f'{source}.to_qkv.weight', paths[0], 'O I 1 1 -> I O'),
    Row(f'{source}.to_qkv.bias', paths[1]),
    *_conv(f'{source}.proj', f'{target}/o', 'O I 1 1 -> I O'),
  )


def _list(source: str, half: str, step: str, blocks: int, names: tuple[str, ...]) -> list[Row]:
  """Residual blocks and the layers between levels, numbered in one list."""
  rows: list[Row] = []
  for level in range(_LEVELS):
    first = level * (blocks + 1)
    for i in range(blocks):
      rows += _block(f'{source}.{first + i}', f'{half}/level_{level}/block_{i}', names)
    if level + 1 < _LEVELS:
      rows += _conv(f'{source}.{first + blocks}.resample.1', f'{half}/{step}_{level}')
  return rows


_BLOCK = ('norm1', 'conv1', 'norm2', 'conv2', 'conv_shortcut')
_ORIGINAL_BLOCK = ('residual.0', 'residual.2', 'residual.3', 'residual.6', 'shortcut')


def _ends(half: str) -> tuple[Row, ...]:
  return (
    *_causal(f'{half}.conv_in', f'{half}/start'),
    *_block(f'{half}.mid_block.resnets.{{j}}', f'{half}/middle/block_{{j}}', _BLOCK),
    *_attention(f'{half}.mid_block.attentions.0', f'{half}/middle/attention'),
    *_norm(f'{half}.norm_out', f'{half}/norm'),
    *_causal(f'{half}.conv_out', f'{half}/end'),
  )


def _original_ends(half: str) -> tuple[Row, ...]:
  return (
    *_causal(f'{half}.conv1', f'{half}/start'),
    *_block(f'{half}.middle.0', f'{half}/middle/block_0', _ORIGINAL_BLOCK),
    *_attention(f'{half}.middle.1', f'{half}/middle/attention'),
    *_block(f'{half}.middle.2', f'{half}/middle/block_1', _ORIGINAL_BLOCK),
    *_norm(f'{half}.head.0', f'{half}/norm'),
    *_causal(f'{half}.head.2', f'{half}/end'),
  )


LAYOUTS = (
  Table(
    name='wan_vae (diffusers)',
    rows=(
      *_ends('encoder'),
      *_list('encoder.down_blocks', 'encoder', 'down', _BLOCKS, _BLOCK),
      *_ends('decoder'),
      *_block('decoder.up_blocks.{i}.resnets.{j}', 'decoder/level_{i}/block_{j}', _BLOCK),
      *_conv('decoder.up_blocks.{i}.upsamplers.0.resample.1', 'decoder/up_{i}'),
      *_causal('quant_conv', 'quant'),
      *_causal('post_quant_conv', 'post_quant'),
    ),
    ignored=_IGNORED,
  ),
  Table(
    name='wan_vae (Wan2.1_VAE.pth)',
    rows=(
      *_original_ends('encoder'),
      *_list('encoder.downsamples', 'encoder', 'down', _BLOCKS, _ORIGINAL_BLOCK),
      *_original_ends('decoder'),
      *_list('decoder.upsamples', 'decoder', 'up', _BLOCKS + 1, _ORIGINAL_BLOCK),
      *_causal('conv1', 'quant'),
      *_causal('conv2', 'post_quant'),
    ),
    ignored=_IGNORED,
  ),
)
