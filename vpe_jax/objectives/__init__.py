"""Training objectives: losses, targets and schedules."""
