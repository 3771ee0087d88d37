"""CLIP, both towers (transformers' CLIPModel)."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import rows


def _encoder(source: str, target: str) -> tuple[Row, ...]:
  return rows.encoder_layer(f'{source}.layers.{{n}}', f'{target}/layers_{{n}}')


_VISION = 'vision_model.embeddings'

LAYOUTS = (
  Table(
    name='clip (transformers)',
    rows=(
      Row(f'{_VISION}.class_embedding', 'vision/tokens/class'),
      *rows.linear(f'{_VISION}.patch_embedding', 'vision/tokens/patch', rows.PATCHES),
      Row(f'{_VISION}.position_embedding.weight', 'vision/tokens/position'),
      *rows.layer_norm('vision_model.pre_layrnorm', 'vision/entry_norm'),
      *_encoder('vision_model.encoder', 'vision/encoder'),
      *rows.layer_norm('vision_model.post_layernorm', 'vision/encoder/norm'),
      *rows.linear('visual_projection', 'vision/projection'),
      Row('text_model.embeddings.token_embedding.weight', 'text/token'),
      Row('text_model.embeddings.position_embedding.weight', 'text/position'),
      *_encoder('text_model.encoder', 'text/encoder'),
      *rows.layer_norm('text_model.final_layer_norm', 'text/encoder/norm'),
      *rows.linear('text_projection', 'text/projection'),
      Row('logit_scale', 'logit_scale'),
    ),
    ignored=((r'.*\.position_ids', 'a buffer of the numbers 0, 1, 2, ...'),),
  ),
)
