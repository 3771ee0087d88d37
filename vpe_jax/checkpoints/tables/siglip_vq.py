"""SigLIP-VQ: X-Omni's pickled files, and the copies in LLaDA2.0-Uni and GLM-Image."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import rows

_POINTWISE = 'O I 1 1 -> I O'


def _fused(source: str, target: str) -> tuple[Row, ...]:
  """A fused tensor of q, k and v."""
  names = lambda leaf: tuple(f'{target}/{name}/{leaf}' for name in 'qkv')
  return (
    Row(f'{source}.weight', names('kernel'), '(N H) D -> D N H'),
    Row(f'{source}.bias', names('bias'), '(N H) -> N H'),
  )


def _tower(source: str, position: Row) -> tuple[Row, ...]:
  """The tower; `source` is the prefix of its keys."""
  layer, ours = f'{source}blocks.{{n}}', 'encoder/layers_{n}'
  return (
    *rows.patches(f'{source}patch_embed.proj', 'embed'),
    position,
    *rows.layer_norm(f'{layer}.norm1', f'{ours}/attention_norm'),
    *_fused(f'{layer}.attn.qkv', f'{ours}/attention'),
    *rows.dense(f'{layer}.attn.proj', f'{ours}/attention/o', 'D (N H) -> N H D'),
    *rows.layer_norm(f'{layer}.norm2', f'{ours}/mlp_norm'),
    *rows.mlp(f'{layer}.mlp', f'{ours}/mlp'),
  )


def _codebook(source: str) -> tuple[Row, ...]:
  """The codebook and adjacent layers; `source` is the prefix of their keys."""
  block, ours = f'{source}post_conv.{{n}}', 'post_{n}'
  post = (
    row
    for i in (1, 2)
    for row in (
      *rows.layer_norm(f'{block}.norm{i}', f'{ours}/norm_{i}'),
      *rows.dense(f'{block}.conv{i}', f'{ours}/conv_{i}', 'O I p q -> p q I O'),
    )
  )
  return (
    *rows.dense(f'{source}quant_conv', 'quant', _POINTWISE),
    *rows.dense(f'{source}post_quant_conv', 'post_quant', _POINTWISE),
    Row(f'{source}quantize.embedding.weight', 'codebook'),
    *post,
  )


_TOWER = _tower(
  'model.visual.', Row('model.visual.embeddings.position_embedding.weight', 'position')
)
_TOWER_AND_CODEBOOK = (*_TOWER, *_codebook('model.vqmodel.'))

LAYOUTS = (
  # LLaDA2.0-Uni's files have no post blocks; an export of X-Omni's network to this layout has them.
  Table(name='siglip_vq (LLaDA2.0-Uni)', rows=_TOWER_AND_CODEBOOK),
  Table(
    name='siglip_vq (GLM-Image)',
    rows=_TOWER_AND_CODEBOOK,
    ignored=(
      (r'model\.language_model\..*|lm_head\.weight', 'the language model, which reads the codes'),
    ),
  ),
  # X-Omni publishes two files, which must be in one folder: the tower, and all other layers.
  Table(
    name='siglip_vq (X-Omni)',
    rows=(
      *_tower('', Row('pos_embed', 'position', '1 P D -> P D')),
      *_codebook(''),
    ),
    ignored=((r'(norm|attn_pool)\..*', 'follows the last layer, whose raw output is used'),),
  ),
)
