"""DINOv2 (transformers' Dinov2Model)."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import rows

_LAYER, _OURS = 'encoder.layer.{n}', 'encoder/layers_{n}'
_QKV = (('query', 'q'), ('key', 'k'), ('value', 'v'))
_GATED = tuple(f'{_OURS}/mlp/{name}' for name in ('gate', 'value'))

LAYOUTS = (
  Table(
    name='dinov2 (transformers)',
    rows=(
      Row('embeddings.cls_token', 'tokens/class', '1 1 D -> D'),
      *rows.patches('embeddings.patch_embeddings.projection', 'tokens/patch'),
      Row('embeddings.position_embeddings', 'tokens/position', '1 P D -> P D'),
      *(
        row
        for source, target in _QKV
        for row in rows.dense(
          f'{_LAYER}.attention.attention.{source}',
          f'{_OURS}/attention/{target}',
          rows.TO_HEADS,
          '(N H) -> N H',
        )
      ),
      *rows.dense(f'{_LAYER}.attention.output.dense', f'{_OURS}/attention/o', rows.FROM_HEADS),
      *rows.layer_norm(f'{_LAYER}.norm1', f'{_OURS}/attention_norm'),
      *rows.layer_norm(f'{_LAYER}.norm2', f'{_OURS}/mlp_norm'),
      Row(f'{_LAYER}.layer_scale1.lambda1', f'{_OURS}/attention_scale/scale'),
      Row(f'{_LAYER}.layer_scale2.lambda1', f'{_OURS}/mlp_scale/scale'),
      *rows.mlp(f'{_LAYER}.mlp', f'{_OURS}/mlp'),
      # The giant model has a gated MLP.
      Row(f'{_LAYER}.mlp.weights_in.weight', tuple(f'{n}/kernel' for n in _GATED), 'O I -> I O'),
      Row(f'{_LAYER}.mlp.weights_in.bias', tuple(f'{n}/bias' for n in _GATED), 'O -> O'),
      *rows.dense(f'{_LAYER}.mlp.weights_out', f'{_OURS}/mlp/out'),
      *rows.layer_norm('layernorm', 'encoder/norm'),
    ),
    ignored=((r'embeddings\.mask_token', 'replaces masked patches in training only'),),
  ),
)
