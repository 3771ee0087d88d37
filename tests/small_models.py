"""Small reference models that several tests save and import."""

from __future__ import annotations

from typing import Any

_TEXT = {
  'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'num_key_value_heads': 2,
  'intermediate_size': 16, 'vocab_size': 32, 'vision_vocab_size': 64, 'pad_token_id': 0,
}  # fmt: skip
VISION = {
  'depth': 2, 'hidden_size': 48, 'num_heads': 3, 'intermediate_size': 64, 'image_size': 128,
}  # fmt: skip
VQ = {'embed_dim': 32, 'num_embeddings': 48, 'latent_channels': 48}


def glm_image() -> Any:
  """A GLM-Image with its language model, of the sizes VISION and VQ, as torch initialises it."""
  from transformers.models.glm_image import GlmImageConfig, GlmImageForConditionalGeneration

  config = GlmImageConfig(text_config=_TEXT, vision_config=VISION, vq_config=VQ)
  return GlmImageForConditionalGeneration(config).eval()
