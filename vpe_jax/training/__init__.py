"""Training: state, optimizer, step, loop, logs and reports."""
