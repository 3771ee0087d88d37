"""Wan 2.1's autoencoder for still images (import only).

A causal convolution over three frames sees two frames of zeros and then the still image, so only
the last time slice of its kernel is used. There are two layouts of keys: diffusers' and that of the
original `Wan2.1_VAE.pth`. Both number the encoder's residual blocks and downsampling layers in one
list; the original also numbers the decoder's residual blocks and upsampling layers in one list.
"""

from vpe_jax.checkpoints.table import Row, Table

_LEVELS, _BLOCKS = 4, 2  # residual blocks per level of the encoder; the decoder has one more
_IGNORED = ((r'.*\.time_conv\.(weight|bias)', 'mixes frames; a still image has a single frame'),)


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
  """A residual block; `names`: the source's names of norm 1, conv 1, norm 2, conv 2, shortcut."""
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


def _numbered_levels(
  source: str, network: str, resampling: str, blocks: int, names: tuple[str, ...]
) -> list[Row]:
  """All levels, their residual blocks and resampling layers numbered in one list.

  Args:
    source: the source's name of the list.
    network: `encoder` or `decoder`.
    resampling: `down` or `up`, our name of the layers between levels.
    blocks: residual blocks per level.
    names: see `_block`.
  """
  rows: list[Row] = []
  for level in range(_LEVELS):
    first = level * (blocks + 1)
    for i in range(blocks):
      rows += _block(f'{source}.{first + i}', f'{network}/level_{level}/block_{i}', names)
    if level + 1 < _LEVELS:
      rows += _conv(f'{source}.{first + blocks}.resample.1', f'{network}/{resampling}_{level}')
  return rows


_LAYERS = ('norm1', 'conv1', 'norm2', 'conv2', 'conv_shortcut')
_ORIGINAL_LAYERS = ('residual.0', 'residual.2', 'residual.3', 'residual.6', 'shortcut')


def _shared_layers(network: str) -> tuple[Row, ...]:
  """First, middle and last layers; their names are the same in encoder and decoder."""
  return (
    *_causal(f'{network}.conv_in', f'{network}/start'),
    *_block(f'{network}.mid_block.resnets.{{j}}', f'{network}/middle/block_{{j}}', _LAYERS),
    *_attention(f'{network}.mid_block.attentions.0', f'{network}/middle/attention'),
    *_norm(f'{network}.norm_out', f'{network}/norm'),
    *_causal(f'{network}.conv_out', f'{network}/end'),
  )


def _original_shared_layers(network: str) -> tuple[Row, ...]:
  return (
    *_causal(f'{network}.conv1', f'{network}/start'),
    *_block(f'{network}.middle.0', f'{network}/middle/block_0', _ORIGINAL_LAYERS),
    *_attention(f'{network}.middle.1', f'{network}/middle/attention'),
    *_block(f'{network}.middle.2', f'{network}/middle/block_1', _ORIGINAL_LAYERS),
    *_norm(f'{network}.head.0', f'{network}/norm'),
    *_causal(f'{network}.head.2', f'{network}/end'),
  )


LAYOUTS = (
  Table(
    name='wan_vae (diffusers)',
    rows=(
      *_shared_layers('encoder'),
      *_numbered_levels('encoder.down_blocks', 'encoder', 'down', _BLOCKS, _LAYERS),
      *_shared_layers('decoder'),
      *_block('decoder.up_blocks.{i}.resnets.{j}', 'decoder/level_{i}/block_{j}', _LAYERS),
      *_conv('decoder.up_blocks.{i}.upsamplers.0.resample.1', 'decoder/up_{i}'),
      *_causal('quant_conv', 'quant'),
      *_causal('post_quant_conv', 'post_quant'),
    ),
    ignored=_IGNORED,
  ),
  Table(
    name='wan_vae (Wan2.1_VAE.pth)',
    rows=(
      *_original_shared_layers('encoder'),
      *_numbered_levels('encoder.downsamples', 'encoder', 'down', _BLOCKS, _ORIGINAL_LAYERS),
      *_original_shared_layers('decoder'),
      *_numbered_levels('decoder.upsamples', 'decoder', 'up', _BLOCKS + 1, _ORIGINAL_LAYERS),
      *_causal('conv1', 'quant'),
      *_causal('conv2', 'post_quant'),
    ),
    ignored=_IGNORED,
  ),
)
