"""Tokenizers: the shipped BPE, class names, and tokenizers of published language models."""
