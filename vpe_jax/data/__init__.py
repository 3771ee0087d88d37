"""Records, pictures and captions: from a config to batches of examples, without network."""
