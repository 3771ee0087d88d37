"""Pure functions on arrays (attention, rotary positions, norms, matmuls), and FLOPs counts."""
