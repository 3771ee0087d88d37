"""Sheets of images: layout of one, and those of several runs combined."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from vpe_jax.evaluation.report import Row, Sheet
from vpe_jax.sampling import images


def layout(sheet: Sheet) -> Image.Image:
  """The sheet as one image; smaller images are enlarged to the largest, without smoothing."""
  side = max(row.images.shape[1] for row in sheet)
  rows = [[_enlarged(image, side) for image in row.images] for row in sheet]
  return images.grid(rows, [row.captions for row in sheet], [row.label for row in sheet])


def together(sheets: Mapping[str, Sheet]) -> Sheet:
  """One sheet with the rows of several runs, whose names are the keys.

  Rows of one label follow one another. Rows that all runs share (the true images) appear once; the
  labels of other rows name their runs.
  """
  runs: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
  rows: dict[tuple[str, tuple[int, ...], bytes], Row] = {}
  for run, sheet in sheets.items():
    for row in sheet:
      key = (row.label, row.images.shape, row.images.tobytes())
      runs.setdefault(key, []).append(run)
      rows.setdefault(key, row)
  labels = list(dict.fromkeys(label for label, *_ in rows))
  combined = []
  for key in sorted(rows, key=lambda key: labels.index(key[0])):
    of_all = len(runs[key]) == len(sheets)
    label = key[0] if of_all else f'{", ".join(runs[key])}: {key[0]}'
    combined.append(Row(label, rows[key].images, rows[key].captions))
  return tuple(combined)


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
  return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST))
