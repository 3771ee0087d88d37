"""Checkpoints of runs (`store`) and files of weights (`weights`)."""
