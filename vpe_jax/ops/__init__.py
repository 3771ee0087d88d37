"""Pure functions on arrays: attention, rotary positions, norms."""
