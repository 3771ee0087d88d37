"""Generated images as files: 8-bit conversion, captioned grids, PNG files with metadata."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from vpe_jax import storage
from vpe_jax.contracts import UserError

_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)
_GAP = 12  # pixels between images and around the grid
_COLUMNS = 8  # images per row


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
  """One generated image and its provenance.

  Attributes:
    image: uint8 [R, R, 3].
    prompt: the text prompt.
    index: its index among the `n` images of its prompt.
    seed: the seed of the call.
    encoded: the encoded entries that the image was rendered from, by name, such as `latents`.
    metadata: text chunks for a PNG: prompt, seed, index, settings, checkpoint, weights, version,
      generated, and what the caller adds.
  """

  image: np.ndarray
  prompt: str
  index: int
  seed: int
  encoded: Mapping[str, np.ndarray]
  metadata: Mapping[str, str]

  def save(self, path: str, overwrite: bool = False) -> None:
    """Writes a PNG with the metadata in its text chunks."""
    save_png(self.image, path, self.metadata, overwrite)

  def with_metadata(self, **metadata: str) -> GeneratedImage:
    """The same image with more text chunks."""
    return dataclasses.replace(self, metadata={**self.metadata, **metadata})


def to_uint8(image: np.ndarray) -> np.ndarray:
  """Images in [0, 1] as uint8, rounded to the nearest level; values outside are clipped.

  Raises:
    UserError: a value is NaN or infinite.
  """
  image = np.asarray(image, np.float32)
  if not np.isfinite(image).all():
    raise UserError(
      'the image holds NaN or infinity: the network has diverged, or its settings are extreme; '
      'sample with an earlier checkpoint or with less guidance'
    )
  return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def grid(
  rows: Sequence[Sequence[np.ndarray]],
  captions: Sequence[Sequence[str]] | None = None,
  row_labels: Sequence[str] | None = None,
  side: int = 192,
  text_size: int = 14,
) -> Image.Image:
  """Arranges images in rows, with wrapped captions below and labels to the left.

  Args:
    rows: uint8 images [H, W, 3], all of one size; rows may differ in length.
    captions: a text for each image (may be empty); rows without captions have no space for them.
    row_labels: a text for each row.
    side: smaller images are enlarged by the nearest integer factor, without smoothing.
    text_size: font size in pixels.
  """
  shapes = {np.shape(image) for row in rows for image in row}
  if len(shapes) != 1:
    raise ValueError(f'a grid needs one or more images of one size, not of {shapes}')
  height, width, _ = shapes.pop()
  factor = max(1, round(side / max(height, width)))
  cell_w, cell_h = width * factor, height * factor
  font = ImageFont.load_default(text_size)
  line = text_size + text_size // 4
  texts = [[_wrap(text, font, cell_w) for text in row] for row in captions or [[]] * len(rows)]
  labels = [_wrap(text, font, 8 * text_size) for text in row_labels or [''] * len(rows)]
  margin = 8 * text_size + _GAP if any(map(any, labels)) else 0
  caption_heights = [max(map(len, row), default=0) * line for row in texts]
  row_heights = [
    max(cell_h + below, len(label) * line) for below, label in zip(caption_heights, labels)
  ]

  total_w = _GAP + margin + max(map(len, rows)) * (cell_w + _GAP)
  total_h = _GAP + sum(height + _GAP for height in row_heights)
  sheet = Image.new('RGB', (total_w, total_h), _PAPER)
  pen = ImageDraw.Draw(sheet)
  top = _GAP
  for row, text, label, row_height in zip(rows, texts, labels, row_heights, strict=True):
    _write(pen, label, (_GAP, top), font, line)
    for column, image in enumerate(row):
      left = _GAP + margin + column * (cell_w + _GAP)
      cell = Image.fromarray(np.asarray(image, np.uint8)).resize(
        (cell_w, cell_h), Image.Resampling.NEAREST
      )
      sheet.paste(cell, (left, top))
      # Embedded images have a white background: a thin frame shows where each one ends.
      pen.rectangle((left - 1, top - 1, left + cell_w, top + cell_h), outline=_FAINT)
      if column < len(text):
        _write(pen, text[column], (left, top + cell_h + 2), font, line)
    top += row_height + _GAP
  return sheet


def sheet(images: Sequence[GeneratedImage]) -> tuple[Image.Image, dict[str, str]]:
  """A grid of all images, and its text chunks.

  The grid has a row for each prompt, or captioned images if each prompt has a single one. A text
  chunk whose value differs between images lists all values, one per line.
  """
  metadata = {
    key: '\n'.join(dict.fromkeys(item.metadata[key] for item in images))
    for key in images[0].metadata
  }
  prompts = list(dict.fromkeys(item.prompt for item in images))
  if len(prompts) == len(images):
    lines = [images[start : start + _COLUMNS] for start in range(0, len(images), _COLUMNS)]
    rows = [[item.image for item in line] for line in lines]
    return grid(rows, [[item.prompt for item in line] for line in lines]), metadata
  rows, labels = [], []
  for prompt in prompts:
    prompt_images = [item.image for item in images if item.prompt == prompt]
    starts = range(0, len(prompt_images), _COLUMNS)
    rows += [prompt_images[start : start + _COLUMNS] for start in starts]
    labels += [prompt] + [''] * (len(starts) - 1)
  return grid(rows, row_labels=labels), metadata


def save_png(
  image: np.ndarray | Image.Image,
  path: str | os.PathLike[str],
  metadata: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a PNG atomically, with `metadata` in its text chunks.

  Args:
    image: uint8 [H, W, 3], or a Pillow image.
    path: file to write, local (`~` expands to the home folder) or gs://; its folder is created.
    metadata: keyword -> text (any Unicode); `PIL.Image.open(path).text` reads it.
    overwrite: whether to replace an existing file.

  Raises:
    UserError: the file exists (and `overwrite` is off), or can't be written.
  """
  path = storage.resolve(path)
  _refuse_existing(path, overwrite)
  chunks = PngImagePlugin.PngInfo()
  for keyword, text in (metadata or {}).items():
    chunks.add_text(keyword, text)
  if not isinstance(image, Image.Image):
    image = Image.fromarray(np.asarray(image, np.uint8))
  buffer = io.BytesIO()
  image.save(buffer, format='PNG', pnginfo=chunks)
  with storage.writing(path):
    storage.write_atomic(path, buffer.getvalue())


def output_files(out: str, count: int, overwrite: bool = False) -> list[str]:
  """The paths of output files; front doors check them before the work starts.

  Args:
    out: a file for one image or a sheet of all (ends in .png), or a folder (ends in /) for one file
      per image: 000.png, ...
    count: number of images.
    overwrite: whether files may be replaced.

  Raises:
    UserError: a file exists (and `overwrite` is off), is a folder, or has another suffix.
  """
  if not out.lower().endswith(('.png', '/')) and not storage.resolve(out).is_dir():
    raise UserError(f'{out}: image files end in .png, and a folder of them in /')
  paths = [f'{out}{index:03d}.png' for index in range(count)] if out.endswith('/') else [out]
  for path in paths:
    file = storage.resolve(path)
    if file.is_dir():
      raise UserError(f'{path} is a folder: name another file, or {path}/ for one file per image')
    _refuse_existing(file, overwrite)
  return paths


def save_all(
  images: Sequence[GeneratedImage],
  out: str,
  metadata: bool = True,
  overwrite: bool = False,
  as_sheet: bool = False,
) -> None:
  """Writes one image as it is, several to one captioned sheet, or each to a file of its own.

  Args:
    images: one or more generated images.
    out: see `output_files`.
    metadata: whether text chunks record the provenance.
    overwrite: whether to replace existing files.
    as_sheet: whether a single image gets a sheet with its caption, too.

  Raises:
    UserError: see `output_files` and `save_png`.
  """
  files = [(item.image, item.metadata) for item in images]
  if not out.endswith('/') and (as_sheet or len(images) > 1):
    files = [sheet(images)]
  paths = output_files(out, len(images), overwrite)
  for path, (image, chunks) in zip(paths, files, strict=True):
    save_png(image, path, chunks if metadata else None, overwrite)


def _refuse_existing(path: epath.Path, overwrite: bool) -> None:
  if not overwrite and path.exists():
    raise UserError(
      f'{path} exists: name another file, or replace it (--overwrite, overwrite=True)'
    )


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
  """Breaks a text into lines of at most `width` pixels.

  A line ends between words or after one of `/ . _ - ,`; only a part that is longer than a line is
  broken elsewhere.
  """
  lines = ['']
  for part in re.findall(r'\s*[^\s/._,-]*[/._,-]*', ' '.join(text.split())):
    if font.getlength(lines[-1] + part) <= width:
      lines[-1] += part
      continue
    if lines[-1]:
      lines.append('')
    for letter in part.strip():
      if font.getlength(lines[-1] + letter) > width:
        lines.append('')
      lines[-1] += letter
  return lines if lines != [''] else []


def _write(
  pen: ImageDraw.ImageDraw,
  lines: Sequence[str],
  corner: tuple[int, int],
  font: ImageFont.FreeTypeFont,
  line: int,
) -> None:
  for index, text in enumerate(lines):
    pen.text((corner[0], corner[1] + index * line), text, fill=_INK, font=font)
