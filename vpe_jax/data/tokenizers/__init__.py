"""Tokenizers: the shipped BPE, class names, and those of published language models."""
