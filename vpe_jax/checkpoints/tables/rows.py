"""Rows that tables of several families share: layers and models with equal tensor names.

Arguments are templates of keys and paths, and einops patterns; see table.Row.
"""

from collections.abc import Iterator

from vpe_jax.checkpoints.table import Row, Table

PATCHES = 'D C p q -> (p q C) D'  # a convolution whose stride equals its kernel size
TO_HEADS = '(N H) D -> D N H'  # a projection of q, k or v
FROM_HEADS = 'D (N H) -> N H D'  # the output projection


def linear(source: str, target: str, kernel: str = 'O I -> I O') -> tuple[Row, ...]:
  """A dense layer's kernel, without a bias."""
  return (Row(f'{source}.weight', f'{target}/kernel', kernel),)


def dense(source: str, target: str, kernel: str = 'O I -> I O', bias: str = '') -> tuple[Row, ...]:
  """A dense layer's kernel and bias."""
  return (*linear(source, target, kernel), Row(f'{source}.bias', f'{target}/bias', bias))


def patches(source: str, target: str) -> tuple[Row, ...]:
  """A convolution whose stride equals its kernel size, as a dense layer over patches."""
  return dense(source, target, PATCHES)


def rms_norm(source: str, target: str) -> tuple[Row, ...]:
  """An RMS norm's scale."""
  return (Row(f'{source}.weight', f'{target}/scale'),)


def layer_norm(source: str, target: str) -> tuple[Row, ...]:
  """A layer norm's scale and bias."""
  return (*rms_norm(source, target), Row(f'{source}.bias', f'{target}/bias'))


def mlp(source: str, target: str) -> tuple[Row, ...]:
  """Two dense layers (`fc1`, `fc2`)."""
  return (*dense(f'{source}.fc1', f'{target}/up'), *dense(f'{source}.fc2', f'{target}/down'))


def _projections(source: str, target: str) -> Iterator[Row]:
  for name in 'qkv':
    yield from dense(
      f'{source}.self_attn.{name}_proj', f'{target}/{name}', TO_HEADS, '(N H) -> N H'
    )


def encoder_layer(source: str, target: str) -> tuple[Row, ...]:
  """A layer of models/vit.py, with transformers' names for SigLIP and CLIP."""
  return (
    *_projections(source, f'{target}/attention'),
    *dense(f'{source}.self_attn.out_proj', f'{target}/attention/o', FROM_HEADS),
    *layer_norm(f'{source}.layer_norm1', f'{target}/attention_norm'),
    *layer_norm(f'{source}.layer_norm2', f'{target}/mlp_norm'),
    *mlp(f'{source}.mlp', f'{target}/mlp'),
  )


def decoder_layer(source: str, target: str) -> tuple[Row, ...]:
  """A layer of models/transformer.py, with transformers' names for Qwen2 and Llama.

  Rows for biases and for q and k norms match nothing in networks without them.
  """
  return (
    *_projections(source, target),
    *linear(f'{source}.self_attn.o_proj', f'{target}/o', FROM_HEADS),
    *rms_norm(f'{source}.self_attn.q_norm', f'{target}/q_norm'),
    *rms_norm(f'{source}.self_attn.k_norm', f'{target}/k_norm'),
    *(
      row
      for name in ('gate', 'up', 'down')
      for row in linear(f'{source}.mlp.{name}_proj', f'{target}/{name}')
    ),
    *rms_norm(f'{source}.input_layernorm', f'{target}/attention_norm'),
    *rms_norm(f'{source}.post_attention_layernorm', f'{target}/mlp_norm'),
  )


def language_model(name: str) -> Table:
  """A network of models/decoder.py, with transformers' names for Qwen2 and Llama."""
  return Table(
    name=name,
    rows=(
      Row('model.embed_tokens.weight', 'embed'),
      *decoder_layer('model.layers.{n}', 'layers'),
      *rms_norm('model.norm', 'norm'),
      *linear('lm_head', 'head', 'V D -> D V'),
    ),
    ignored=((r'model\..*\.rotary_emb\.inv_freq', 'RoPE frequencies, computed from the sizes'),),
    ties=(('lm_head.weight', 'model.embed_tokens.weight'),),
  )
