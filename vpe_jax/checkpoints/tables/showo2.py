"""Show-o2 (the released state dict of Showo2Qwen2_5)."""

from vpe_jax.checkpoints.table import Row, Table
from vpe_jax.checkpoints.tables import rows

_HEAD, _DUAL = 'dit/head', 'dit/dual_path'

LAYOUTS = (
  Table(
    name='show-o2',
    rows=(
      Row('showo.model.embed_tokens.weight', 'embed/text'),
      *rows.decoder_layer('showo.model.layers.{n}', 'ar/layers'),
      *rows.rms_norm('showo.model.norm', 'ar/norm'),
      *rows.patches('image_embedder_und.proj', f'{_DUAL}/ends/und'),
      *rows.patches('image_embedder_gen.proj', f'{_DUAL}/ends/gen'),
      Row('position_embedding.weight', f'{_DUAL}/ends/positions'),
      *rows.encoder_layer('und_trans.layers.{n}', f'{_DUAL}/encoder'),
      *rows.rms_norm('fusion_proj.0', f'{_DUAL}/ends/fusion_norm'),
      *rows.dense('fusion_proj.1', f'{_DUAL}/ends/fusion_in'),
      *rows.dense('fusion_proj.3', f'{_DUAL}/ends/fusion_out'),
      *rows.dense('time_embed.mlp.0', f'{_HEAD}/time/in'),
      *rows.dense('time_embed.mlp.2', f'{_HEAD}/time/out'),
      *rows.dense('time_embed_proj', f'{_HEAD}/time/token'),
      *rows.dense('diff_proj.0', f'{_HEAD}/entry/in'),
      *rows.dense('diff_proj.2', f'{_HEAD}/entry/out'),
      *rows.decoder_layer('diffusion_head_a.{n}', f'{_HEAD}/blocks'),
      *rows.dense('diffusion_head_a.{n}.adaLN_modulation.1', f'{_HEAD}/blocks/modulation/out'),
      *rows.rms_norm('diffusion_head_b.norm_final', f'{_HEAD}/exit/norm'),
      *rows.dense('diffusion_head_b.adaLN_modulation.1', f'{_HEAD}/exit/modulation/out'),
      *rows.dense('diffusion_head_b.linear', f'{_HEAD}/exit/out'),
    ),
    ignored=(
      (r'image_position_ids', 'a buffer of the numbers 0, 1, 2, ...'),
      (r'showo\..*\.rotary_emb\.inv_freq', 'RoPE frequencies, computed from the sizes'),
    ),
    absent=((r'embed/codes', 'Show-o2 has no visual prompt: its embeddings are new'),),
    ties=(('showo.lm_head.weight', 'showo.model.embed_tokens.weight'),),
  ),
)
