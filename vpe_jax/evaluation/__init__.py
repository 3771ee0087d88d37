"""Benchmarks of pictures, one a file: they see images and captions, never the model's insides."""
