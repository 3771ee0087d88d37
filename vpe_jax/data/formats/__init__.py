"""Formats of user data: folders, WebDataset tars, Parquet, TFDS and prepared ArrayRecord."""
