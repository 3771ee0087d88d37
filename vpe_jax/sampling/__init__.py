"""Samplers and guidance for any system, over networks that read or extend a cached prefix."""
