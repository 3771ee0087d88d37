"""Attention over a Visibility: one file per implementation, and the chooser."""
