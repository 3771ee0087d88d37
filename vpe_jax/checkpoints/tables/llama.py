"""Llama 3 (transformers' LlamaForCausalLM)."""

from vpe_jax.checkpoints.tables import rows

LAYOUTS = (rows.language_model('llama (transformers)'),)
