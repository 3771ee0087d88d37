"""Training: state, optimizer, step, loop, and everything that a person sees of a run."""
