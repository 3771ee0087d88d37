"""LlamaGen's class-conditional GPT (the released state dict)."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import rows

_LAYER = 'layers.{n}'

LAYOUTS = (
  Table(
    name='llamagen',
    rows=(
      Row('cls_embedding.embedding_table.weight', 'embed/classes'),
      Row('tok_embeddings.weight', 'embed/codes'),
      Row(
        f'{_LAYER}.attention.wqkv.weight',
        tuple(f'layers/{name}/kernel' for name in 'qkv'),
        rows.TO_HEADS,
      ),
      *rows.linear(f'{_LAYER}.attention.wo', 'layers/o', rows.FROM_HEADS),
      *rows.rms_norm(f'{_LAYER}.attention_norm', 'layers/attention_norm'),
      *rows.rms_norm(f'{_LAYER}.ffn_norm', 'layers/mlp_norm'),
      *rows.linear(f'{_LAYER}.feed_forward.w1', 'layers/gate'),
      *rows.linear(f'{_LAYER}.feed_forward.w3', 'layers/up'),
      *rows.linear(f'{_LAYER}.feed_forward.w2', 'layers/down'),
      *rows.rms_norm('norm', 'norm'),
      *rows.linear('output', 'head', 'V D -> D V'),
    ),
  ),
)
