"""What is optimised: losses, targets and schedules."""
