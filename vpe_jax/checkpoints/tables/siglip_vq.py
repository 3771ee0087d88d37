"""SigLIP-VQ: X-Omni's pickles, and the copies in LLaDA2.0-Uni and GLM-Image."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import rows

_POINT = 'O I 1 1 -> I O'


def _fused(source: str, target: str) -> tuple[Row, ...]:
  """One tensor for q, k and v."""
  names = lambda leaf: tuple(f'{target}/{name}/{leaf}' for name in 'qkv')
  return (
    Row(f'{source}.weight', names('kernel'), '(N H) D -> D N H'),
    Row(f'{source}.bias', names('bias'), '(N H) -> N H'),
  )


def _tower(source: str, position: Row) -> tuple[Row, ...]:
  """The tower; keys begin with `source`."""
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
  """The codebook and the layers around it; keys begin with `source`."""
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
    *rows.dense(f'{source}quant_conv', 'quant', _POINT),
    *rows.dense(f'{source}post_quant_conv', 'post_quant', _POINT),
    Row(f'{source}quantize.embedding.weight', 'codebook'),
    *post,
  )


_TOWER = _tower(
  'model.visual.', Row('model.visual.embeddings.position_embedding.weight', 'position')
)
_COPY = (*_TOWER, *_codebook('model.vqmodel.'))

LAYOUTS = (
  # The published copy has no blocks after decoding; an export of X-Omni's has them here.
  Table(name='siglip_vq (LLaDA2.0-Uni)', rows=_COPY),
  Table(
    name='siglip_vq (GLM-Image)',
    rows=_COPY,
    ignored=(
      (r'model\.language_model\..*|lm_head\.weight', 'the language model, which reads the codes'),
    ),
  ),
  # Two files, one for the tower and one for the rest, in one folder.
  Table(
    name='siglip_vq (X-Omni)',
    rows=(
      *_tower('', Row('pos_embed', 'position', '1 P D -> P D')),
      *_codebook(''),
    ),
    ignored=((r'(norm|attn_pool)\..*', "comes after the last layer's raw output"),),
  ),
)
