"""SigLIP and SigLIP 2, both towers (transformers' SiglipModel)."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import rows

_POOL = tuple(f'vision/pooling/attention/{name}' for name in 'qkv')


def _encoder(source: str, target: str) -> tuple[Row, ...]:
  return rows.encoder_layer(f'{source}.layers.{{n}}', f'{target}/layers_{{n}}')


LAYOUTS = (
  Table(
    name='siglip (transformers)',
    rows=(
      *rows.patches('vision_model.embeddings.patch_embedding', 'vision/embed'),
      Row('vision_model.embeddings.position_embedding.weight', 'vision/position'),
      *_encoder('vision_model.encoder', 'vision/encoder'),
      *rows.layer_norm('vision_model.post_layernorm', 'vision/encoder/norm'),
      Row('vision_model.head.probe', 'vision/pooling/probe', '1 P D -> P D'),
      Row(
        'vision_model.head.attention.in_proj_weight',
        tuple(f'{name}/kernel' for name in _POOL),
        '(N H) D -> D N H',
      ),
      Row(
        'vision_model.head.attention.in_proj_bias',
        tuple(f'{name}/bias' for name in _POOL),
        '(N H) -> N H',
      ),
      *rows.dense(
        'vision_model.head.attention.out_proj', 'vision/pooling/attention/o', 'D (N H) -> N H D'
      ),
      *rows.layer_norm('vision_model.head.layernorm', 'vision/pooling/norm'),
      *rows.mlp('vision_model.head.mlp', 'vision/pooling/mlp'),
      Row('text_model.embeddings.token_embedding.weight', 'text/token'),
      Row('text_model.embeddings.position_embedding.weight', 'text/position'),
      *_encoder('text_model.encoder', 'text/encoder'),
      *rows.layer_norm('text_model.final_layer_norm', 'text/encoder/norm'),
      *rows.dense('text_model.head', 'text/head'),
      Row('logit_scale', 'logit_scale', '1 ->'),
      Row('logit_bias', 'logit_bias', '1 ->'),
    ),
    ignored=((r'.*\.position_ids', 'a buffer of the numbers 0, 1, 2, ...'),),
  ),
)
