"""Sheets of images: layout, and sheets that combine several runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from vpe_jax.evaluation.report import Row, Sheet
from vpe_jax.sampling import images


def layout(sheet: Sheet) -> Image.Image:
  """The sheet as one image; images are enlarged to the largest side by nearest neighbour."""
  side = max(row.images.shape[1] for row in sheet)
  rows = [[_enlarged(image, side) for image in row.images] for row in sheet]
  return images.grid(rows, [row.captions for row in sheet], [row.label for row in sheet])


def combine(sheets: Mapping[str, Sheet]) -> Sheet:
  """Combines the rows of several runs, which are named by the keys, into one sheet.

  Rows with the same label are adjacent. Rows that are equal in all runs (the ground truth) appear
  once; the labels of other rows include the names of their runs.
  """
  runs: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
  rows: dict[tuple[str, tuple[int, ...], bytes], Row] = {}
  for run, sheet in sheets.items():
    for row in sheet:
      key = (row.label, row.images.shape, row.images.tobytes())
      runs.setdefault(key, []).append(run)
      rows.setdefault(key, row)
  labels = list(dict.fromkeys(label for label, *_ in rows))
  result = []
  for key in sorted(rows, key=lambda key: labels.index(key[0])):
    is_shared = len(runs[key]) == len(sheets)
    label = key[0] if is_shared else f'{", ".join(runs[key])}: {key[0]}'
    result.append(Row(label, rows[key].images, rows[key].captions))
  return tuple(result)


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
  return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST))
