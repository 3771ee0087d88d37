"""Qwen2 and Qwen2.5 (transformers' Qwen2ForCausalLM)."""

from vpe_jax.checkpoints.tables import rows

LAYOUTS = (rows.language_model('qwen2 (transformers)'),)
