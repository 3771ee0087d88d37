"""Samplers and guidance: they know networks as functions on cached prefixes, and no system."""
