"""Text rendering: does an OCR program read the words of the prompt?

The protocol is that of TextAtlas with another OCR reader: rapidocr, whose package includes the
weights. The text read from an image is lower-cased and split into words. Each word is matched to
the first unmatched expected word with an Indel similarity of at least 80 of 100. Recall, precision
and F1 are computed over the words of all images. The character error rate is the case-sensitive
edit distance, divided by the length of the longer text and averaged over images. The scores of
ground-truth images show what the reader can reach.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vpe_jax.contracts import Samples, UserError
from vpe_jax.data.embedded.words import Words
from vpe_jax.data.records import render
from vpe_jax.evaluation.evaluator import Lowered, Subject
from vpe_jax.evaluation.report import (
  FROM_DRAFTS,
  HELD_OUT,
  Report,
  Row,
  check_options,
  distinct_records,
  protocol,
)

MIN_SIMILARITY = 80  # Indel similarity, of 100
_POOL = 2  # records composed per record used, to find distinct captions
_PACKAGES = ('rapidocr', 'onnxruntime', 'rapidfuzz')
# With these settings, ground-truth images of 64 x 64 pixels are read without error.
_SIDE = 256  # smaller images are enlarged by the nearest integer factor
_BORDER = 32  # white border, in pixels
_SETTINGS = {
  'Global.log_level': 'critical',
  'Global.use_cls': False,  # no text line is upside down
  'Det.limit_side_len': _SIDE + 2 * _BORDER,  # the text detector hardly enlarges any further
}

Read = Callable[[np.ndarray], list[str]]


@dataclasses.dataclass(frozen=True)
class Result:
  """Scores of one set of images.

  Attributes:
    expected: number of expected words.
    read: number of words read.
    matched: number of matched words.
    errors: float [N], character error rate of each image.
  """

  expected: int
  read: int
  matched: int
  errors: np.ndarray

  @property
  def recall(self) -> float:
    """Share of the expected words that were read; TextAtlas calls it accuracy."""
    return self.matched / self.expected

  @property
  def precision(self) -> float:
    """Share of the words read that were expected."""
    return self.matched / self.read if self.read else 0.0

  @property
  def f1(self) -> float:
    """Harmonic mean of recall and precision."""
    return 2 * self.matched / (self.expected + self.read)

  @property
  def error_rate(self) -> float:
    """Mean character error rate."""
    return float(self.errors.mean())

  def summary(self) -> dict[str, Any]:
    """Plain numbers, for JSON."""
    return {
      'recall': self.recall,
      'precision': self.precision,
      'f1': self.f1,
      'character_error_rate': self.error_rate,
      'words_expected': self.expected,
      'words_read': self.read,
      'words_matched': self.matched,
      'images_without_error': float(np.mean(self.errors == 0)),
    }


def check_installed() -> None:
  """Checks that the OCR packages are installed.

  Raises:
    UserError: a package is missing.
  """
  absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
  if absent:
    raise UserError(f'the evaluator ocr needs {", ".join(absent)}: pip install -e .[eval]')


@dataclasses.dataclass(frozen=True)
class Ocr:
  """Reading of held-out words; see vpe_jax.evaluation.evaluator.Evaluator.

  Attributes:
    captions: number of captions of each split.
    splits: held-out splits of the data.
    seed: seed of the captions.
  """

  requires = (Samples,)
  tasks = ('words',)
  folder = 'evaluation'

  captions: int = 512
  splits: tuple[str, ...] = HELD_OUT
  seed: int = 0

  def check(self) -> None:
    """See Evaluator."""
    check_options(self.captions, self.splits, self.seed)
    check_installed()

  def programs(self, subject: Subject) -> list[Lowered]:
    """See Evaluator."""
    return subject.sampling_programs()

  def run(self, subject: Subject) -> Report:
    """Scores ground truth, generated images, and images from ground-truth drafts, if any."""
    read = reader()
    results, lines, sheets, numbers = {}, [], {}, {}
    for split in self.splits:
      records = distinct_records(Words(_POOL * self.captions, split, self.seed), self.captions)
      prompts = [record.caption for record in records]
      expected = [' '.join(word.text for word in record.truth.writing.words) for record in records]
      true = np.stack([render(record, subject.image_size) for record in records])
      rows = {'ground truth': true, 'generated': subject.sample(prompts)}
      if subject.generator.system.drafts:
        rows[FROM_DRAFTS] = subject.sample_from_drafts(prompts, true)
      texts = {name: read(images) for name, images in rows.items()}
      outcomes = {name: measure(texts[name], expected) for name in rows}
      lines += table(split, outcomes)
      numbers[f'ocr/{split}/f1'] = outcomes['generated'].f1
      numbers[f'ocr/{split}/error_rate'] = outcomes['generated'].error_rate
      results[split] = {
        'rows': {name: result.summary() for name, result in outcomes.items()},
        'images': [
          {'caption': caption, 'expected': words, **{name: texts[name][i] for name in texts}}
          for i, (caption, words) in enumerate(zip(prompts, expected))
        ],
      }
      sheets[split] = tuple(
        Row.first(name, images, prompts if name == 'ground truth' else _quoted(texts[name]))
        for name, images in rows.items()
      )
    details = {
      'source': 'vpe_jax.data.embedded.words',
      'reader': f'rapidocr; images enlarged to about {_SIDE} pixels, white border of {_BORDER}',
      'matching': f'first unmatched expected word with an Indel similarity >= {MIN_SIMILARITY}',
      'character_error_rate': 'edit distance over the longer of the two texts, mean over images',
    }
    question = 'do the images show the words of their prompts?'
    record = protocol(self, 'ocr', question, subject, results, **details)
    return Report(numbers, tuple(lines), record, sheets)


@functools.cache
def reader() -> Read:
  """Builds the OCR reader: images [N, R, R, 3] uint8 -> the text of each, lines joined by spaces.

  Results are cached by a hash of the image, as the ground truth is the same for every run.

  Raises:
    UserError: a package is missing.
  """
  check_installed()
  from rapidocr import RapidOCR

  engine, cache = RapidOCR(params=_SETTINGS), {}

  def text(image: np.ndarray) -> str:
    key = (image.shape, hashlib.sha256(image.tobytes()).digest())
    if key not in cache:
      lines = engine(enlarged(image)[..., ::-1]).txts or ()  # rapidocr expects BGR
      cache[key] = ' '.join(line.strip() for line in lines)
    return cache[key]

  def read(images: np.ndarray) -> list[str]:
    return [text(image) for image in tqdm(images, desc='reading', unit='image')]

  return read


def enlarged(image: np.ndarray) -> np.ndarray:
  """The image uint8 [R, R, 3], enlarged for the reader and with a white border."""
  factor = max(1, round(_SIDE / len(image)))
  large = Image.fromarray(image).resize((factor * len(image),) * 2, Image.Resampling.BICUBIC)
  return np.pad(np.asarray(large), ((_BORDER,) * 2, (_BORDER,) * 2, (0, 0)), constant_values=255)


def measure(read: Sequence[str], expected: Sequence[str]) -> Result:
  """Compares the texts read from N images with the expected words."""
  from rapidfuzz.distance import Levenshtein

  counts = np.asarray([matches(*pair) for pair in zip(read, expected, strict=True)])
  errors = [Levenshtein.distance(a, b) / max(len(a), len(b), 1) for a, b in zip(read, expected)]
  return Result(*(int(total) for total in counts.sum(0)), np.asarray(errors))


def matches(read: str, expected: str) -> tuple[int, int, int]:
  """Numbers of expected words, words read, and matched words."""
  from rapidfuzz import fuzz

  words, unmatched = read.lower().split(), expected.lower().split()
  count = len(unmatched)
  for word in words:
    for i, other in enumerate(unmatched):
      if round(fuzz.ratio(word, other)) >= MIN_SIMILARITY:
        del unmatched[i]
        break
  return count, len(words), count - len(unmatched)


def table(split: str, outcomes: dict[str, Result]) -> list[str]:
  """The results of one split as aligned lines."""
  count = len(next(iter(outcomes.values())).errors)
  lines = [
    f'split {split}: words read from {count} images, and character error rate',
    f'  {"images":28}{"recall":>9}{"precision":>11}{"F1":>8}{"character errors":>18}'
    f'{"images without error":>24}',
  ]
  for name, result in outcomes.items():
    lines.append(
      f'  {name:28}{result.recall:>9.1%}{result.precision:>11.1%}{result.f1:>8.1%}'
      f'{result.error_rate:>18.1%}{np.mean(result.errors == 0):>24.1%}'
    )
  return lines


def _quoted(texts: Sequence[str]) -> list[str]:
  return [f'"{text}"' for text in texts]
