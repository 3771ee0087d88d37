"""Run checkpoints (`store`), weight files (`weights`) and conversion of published weights."""
