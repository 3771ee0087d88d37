"""Text rendering: does an OCR program read the words of the prompt?

The protocol is that of TextAtlas with another OCR reader: rapidocr, whose package includes the
weights. The text read from an image is lower-cased and split into words. Each word is matched to
the first unmatched expected word with an Indel similarity of at least 80 of 100. Recall, precision
and F1 are computed over the words of all images. The character error rate is the case-sensitive
edit distance, divided by the length of the longer text and averaged over images. The scores of
ground-truth images show what the reader can reach; those of the same images through the image
codec, and of images rendered from their drafts (where the model has drafts), tell codec, renderer
and planner apart.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vpe_jax.contracts import Samples, UserError
from vpe_jax.data.embedded import words as words_lib
from vpe_jax.data.records import render
from vpe_jax.evaluation import intervals, report
from vpe_jax.evaluation.evaluator import Lowered, Subject, rows_of
from vpe_jax.evaluation.intervals import Figure
from vpe_jax.evaluation.report import (
  GENERATED,
  GROUND_TRUTH,
  HELD_OUT,
  Report,
  Row,
  check_options,
  differences,
  distinct_records,
  hash_items,
  model_figures,
  percent,
  protocol,
  summaries,
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
  """Scores of one set of N images.

  Attributes:
    expected: int [N], numbers of expected words.
    read: int [N], numbers of words read.
    matched: int [N], numbers of matched words.
    errors: float [N], character error rates.
  """

  expected: np.ndarray
  read: np.ndarray
  matched: np.ndarray
  errors: np.ndarray

  @functools.cached_property
  def figures(self) -> dict[str, Figure]:
    """Figures by name.

    recall: share of the expected words that were read; TextAtlas calls it accuracy.
    precision: share of the words read that were expected.
    f1: harmonic mean of recall and precision.
    error_rate: mean character error rate.
    without_error: share of images without an error.
    """
    return {
      'recall': intervals.ratio(self.matched, self.expected),
      'precision': intervals.ratio(self.matched, self.read),
      'f1': intervals.ratio(2 * self.matched, self.expected + self.read),
      'error_rate': intervals.share(self.errors),
      'without_error': intervals.share(self.errors == 0),
    }

  def summary(self) -> dict[str, Any]:
    """Plain numbers, for JSON."""
    words = {'expected': self.expected, 'read': self.read, 'matched': self.matched}
    return {
      **summaries(self.figures),
      **{f'words_{name}': int(counts.sum()) for name, counts in words.items()},
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
    captions: number of captions of each split; words in an image and fonts are those of the run.
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
    """Scores ground truth, also through the codec, and images from own and ground-truth drafts."""
    read, data = reader(), subject.system.config.data
    results, lines, sheets, figures, captions = {}, [], {}, {}, []
    for split in self.splits:
      source = words_lib.of_config(data, _POOL * self.captions, split, self.seed)
      records = distinct_records(source, self.captions)
      prompts = [record.caption for record in records]
      expected = [' '.join(word.text for word in record.truth.writing.words) for record in records]
      true = np.stack([render(record, subject.image_size) for record in records])
      rows = rows_of(subject, prompts, true)
      texts = {name: read(images) for name, images in rows.items()}
      outcomes = {name: measure(texts[name], expected) for name in rows}
      lines += table(split, outcomes)
      by_row = {name: result.figures for name, result in outcomes.items()}
      figures |= model_figures(f'ocr/{split}', by_row, ('recall', 'f1', 'error_rate'))
      captions.append(prompts)
      results[split] = {
        'rows': {name: result.summary() for name, result in outcomes.items()},
        'differences': {name: summaries(pair) for name, pair in differences(by_row).items()},
        'images': [
          {'caption': caption, 'expected': words, **{name: texts[name][i] for name in texts}}
          for i, (caption, words) in enumerate(zip(prompts, expected))
        ],
      }
      sheets[split] = tuple(
        Row.first(name, images, prompts if name == GROUND_TRUTH else _quoted(texts[name]))
        for name, images in rows.items()
      )
    details = {
      'source': 'vpe_jax.data.embedded.words',
      'reader': f'rapidocr; images enlarged to about {_SIDE} pixels, white border of {_BORDER}',
      'matching': f'first unmatched expected word with an Indel similarity >= {MIN_SIMILARITY}',
      'error_rate': 'edit distance over the longer of the two texts, mean over images',
    }
    question = 'do the images show the words of their prompts?'
    record = protocol(self, 'ocr', question, subject, results, **details)
    return Report(figures, tuple(lines), record, sheets, hash_items(*captions))


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
  return Result(*counts.T, np.asarray(errors))


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


def table(split: str, outcomes: Mapping[str, Result]) -> list[str]:
  """The results of one split as aligned lines."""
  by_row = {name: result.figures for name, result in outcomes.items()}
  count = by_row[GENERATED]['f1'].count
  title = f'split {split}: words read from {count} images, and character errors (95% intervals)'
  headers = ('recall', 'precision', 'F1', 'character errors', 'images without error')
  columns = {header: (name, percent) for header, name in zip(headers, by_row[GENERATED])}
  return [title, *report.table(columns, by_row)]


def _quoted(texts: Sequence[str]) -> list[str]:
  return [f'"{text}"' for text in texts]
