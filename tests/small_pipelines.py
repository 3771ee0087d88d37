"""A pipeline without a system: prompts and images of a data section."""

from __future__ import annotations

from typing import Any

from vpe_jax.config import DataConfig
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.preprocess import prompt_and_image

TEXT = ('text', 'text_length')
IMAGES = (*TEXT, 'image')


def small_pipeline(
  data: DataConfig, seed: int = 0, names: tuple[str, ...] = IMAGES, **options: Any
) -> Pipeline:
  """The stream of the inputs `names`; `options` are those of Pipeline."""
  return Pipeline(data, seed, prompt_and_image(data), names, **options)
