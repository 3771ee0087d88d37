"""Data pipeline: from a config to batches of captions and images; imports no model code."""
