"""Token sequences: spans and layouts, the builder of ids, positions and masks, and packing."""
