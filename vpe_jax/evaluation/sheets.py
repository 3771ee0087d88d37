"""Sheets of pictures beside a report: laid out, and those of several runs put together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from vpe_jax.evaluation.report import Row, Sheet
from vpe_jax.sampling import pictures


def layout(sheet: Sheet) -> Image.Image:
  """The sheet as one picture; smaller pictures are enlarged to the largest, without smoothing."""
  side = max(row.images.shape[1] for row in sheet)
  rows = [[_enlarged(image, side) for image in row.images] for row in sheet]
  return pictures.grid(rows, [row.said for row in sheet], [row.label for row in sheet])


def together(sheets: Mapping[str, Sheet]) -> Sheet:
  """One sheet with the rows of several runs, whose names are the keys.

  Rows of one label follow one another. What all runs have (the true pictures) comes once; the
  labels of other rows say of which runs they are.
  """
  runs: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
  rows: dict[tuple[str, tuple[int, ...], bytes], Row] = {}
  for run, sheet in sheets.items():
    for row in sheet:
      key = (row.label, row.images.shape, row.images.tobytes())
      runs.setdefault(key, []).append(run)
      rows.setdefault(key, row)
  labels = list(dict.fromkeys(label for label, *_ in rows))
  found = []
  for key in sorted(rows, key=lambda key: labels.index(key[0])):
    of_all = len(runs[key]) == len(sheets)
    label = key[0] if of_all else f'{", ".join(runs[key])}: {key[0]}'
    found.append(Row(label, rows[key].images, rows[key].said))
  return tuple(found)


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
  return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST))
