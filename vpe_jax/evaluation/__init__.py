"""Evaluators, one per file, for the training loop and for vpe_jax.evaluate."""
