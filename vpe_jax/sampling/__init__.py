"""Samplers and guidance over networks as functions of cached prefixes, for any system."""
