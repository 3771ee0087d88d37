"""Data sets that need no download: drawings, scenes, written words and edits, made by programs."""
