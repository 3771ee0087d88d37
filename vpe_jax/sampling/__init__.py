"""Solvers, guidance and token decoding: they know a velocity or logits function, not a model."""
