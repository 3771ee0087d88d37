"""SigLIP and SigLIP 2, both towers (transformers' SiglipModel)."""

from vpe_jax.checkpoints.table import Row, Table


def _weights(source: str, target: str, kernel: str, bias: str = '') -> tuple[Row, ...]:
  """A dense layer's kernel and bias."""
  return (
    Row(f'{source}.weight', f'{target}/kernel', kernel),
    Row(f'{source}.bias', f'{target}/bias', bias),
  )


def _norm(source: str, target: str) -> tuple[Row, ...]:
  return (Row(f'{source}.weight', f'{target}/scale'), Row(f'{source}.bias', f'{target}/bias'))


def _mlp(source: str, target: str) -> tuple[Row, ...]:
  return (
    *_weights(f'{source}.fc1', f'{target}/up', 'O I -> I O'),
    *_weights(f'{source}.fc2', f'{target}/down', 'O I -> I O'),
  )


def _encoder(source: str, target: str) -> tuple[Row, ...]:
  layer, ours = f'{source}.layers.{{n}}', f'{target}/layers_{{n}}'
  projections = (
    row
    for name in 'qkv'
    for row in _weights(
      f'{layer}.self_attn.{name}_proj',
      f'{ours}/attention/{name}',
      '(N H) D -> D N H',
      '(N H) -> N H',
    )
  )
  return (
    *projections,
    *_weights(f'{layer}.self_attn.out_proj', f'{ours}/attention/o', 'D (N H) -> N H D'),
    *_norm(f'{layer}.layer_norm1', f'{ours}/attention_norm'),
    *_norm(f'{layer}.layer_norm2', f'{ours}/mlp_norm'),
    *_mlp(f'{layer}.mlp', f'{ours}/mlp'),
  )


_POOL = tuple(f'vision/pooling/attention/{name}' for name in 'qkv')

LAYOUTS = (
  Table(
    name='siglip (transformers)',
    rows=(
      *_weights('vision_model.embeddings.patch_embedding', 'vision/embed', 'D C p q -> (p q C) D'),
      Row('vision_model.embeddings.position_embedding.weight', 'vision/position'),
      *_encoder('vision_model.encoder', 'vision/encoder'),
      *_norm('vision_model.post_layernorm', 'vision/encoder/norm'),
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
      *_weights(
        'vision_model.head.attention.out_proj', 'vision/pooling/attention/o', 'D (N H) -> N H D'
      ),
      *_norm('vision_model.head.layernorm', 'vision/pooling/norm'),
      *_mlp('vision_model.head.mlp', 'vision/pooling/mlp'),
      Row('text_model.embeddings.token_embedding.weight', 'text/token'),
      Row('text_model.embeddings.position_embedding.weight', 'text/position'),
      *_encoder('text_model.encoder', 'text/encoder'),
      *_norm('text_model.final_layer_norm', 'text/encoder/norm'),
      *_weights('text_model.head', 'text/head', 'O I -> I O'),
      Row('logit_scale', 'logit_scale', '1 ->'),
      Row('logit_bias', 'logit_bias', '1 ->'),
    ),
    ignored=((r'.*\.position_ids', 'a buffer of the numbers 0, 1, 2, ...'),),
  ),
)
