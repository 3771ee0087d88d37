"""Do pictures of words show the words that they should, to a program that reads?

The protocol of TextAtlas with another reader: rapidocr, whose networks come with the package. What
is read is put in lower case and cut into words; each takes the first word asked for that none has
taken and that is alike by at least 80 of 100 (Indel similarity). Recall, precision and their
harmonic mean F1 are of the words of all pictures together; the character error rate is the edit
distance to the words asked for, case included, over the longer of the two texts, as a mean over
pictures. What is read of the true pictures is the ceiling.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded.words import Words
from vpe_jax.data.records import render
from vpe_jax.evaluation.report import Options, Report, Row, Subject, distinct, protocol

ALIKE = 80  # of 100
_POOL = 2  # pictures composed for each that is used: enough with different captions
_PACKAGES = ('rapidocr', 'onnxruntime', 'rapidfuzz')
# With these, true pictures of 64 x 64 are read without error.
_SIDE = 256  # smaller pictures are enlarged by the whole factor that comes closest
_BORDER = 32  # white, around them
_SETTINGS = {
  'Global.log_level': 'critical',
  'Global.use_cls': False,  # no line stands on its head
  'Det.limit_side_len': _SIDE + 2 * _BORDER,  # lines are found without enlarging it any further
}

Read = Callable[[np.ndarray], list[str]]


@dataclasses.dataclass(frozen=True)
class Result:
  """How one set of pictures was read.

  Attributes:
    asked: words that should be there.
    read: words that were read.
    matched: words of both.
    errors: float [N], the character error rate of each picture.
  """

  asked: int
  read: int
  matched: int
  errors: np.ndarray

  @property
  def recall(self) -> float:
    """Share of the words asked for that were read: TextAtlas' accuracy."""
    return self.matched / self.asked

  @property
  def precision(self) -> float:
    """Share of the words read that were asked for."""
    return self.matched / self.read if self.read else 0.0

  @property
  def f1(self) -> float:
    """Harmonic mean of recall and precision."""
    return 2 * self.matched / (self.asked + self.read)

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
      'words_asked': self.asked,
      'words_read': self.read,
      'words_matched': self.matched,
      'pictures_without_error': float(np.mean(self.errors == 0)),
    }


def check_installed() -> None:
  """Finds out before anything is drawn whether there is something to read with.

  Raises:
    UserError: there isn't.
  """
  absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
  if absent:
    raise UserError(f'the benchmark ocr needs {", ".join(absent)}: pip install -e .[eval]')


def ocr_report(subject: Subject, options: Options) -> Report:
  """Held-out words, with the model's own plans and with those of the true pictures."""
  read = reader()
  results, lines, sheets = {}, [], {}
  for split in options.splits:
    records = distinct(Words(_POOL * options.captions, split, options.seed), options.captions)
    told = [record.caption for record in records]
    asked = [' '.join(word.text for word in record.truth.writing.words) for record in records]
    rows = {'true images': np.stack([render(record, subject.image_size) for record in records])}
    rows['generated'] = subject.draw(told)
    if subject.planner is not None:
      plans = subject.planner.read(rows['true images'], told)
      rows['generated on the true plan'] = subject.planner.render(plans)
    texts = {name: read(images) for name, images in rows.items()}
    found = {name: measure(texts[name], asked) for name in rows}
    lines += table(split, found)
    results[split] = {
      'rows': {name: result.summary() for name, result in found.items()},
      'pictures': [
        {'caption': caption, 'asked': words, **{name: texts[name][i] for name in texts}}
        for i, (caption, words) in enumerate(zip(told, asked))
      ],
    }
    sheets[split] = tuple(
      Row.first(name, images, told if name == 'true images' else _quoted(texts[name]))
      for name, images in rows.items()
    )
  said = {
    'source': 'vpe_jax.data.embedded.words',
    'reader': f'rapidocr; pictures enlarged to about {_SIDE} pixels, {_BORDER} of white around',
    'matching': f'a word read takes the first free word asked for with a ratio of {ALIKE} or more',
    'character_error_rate': 'edit distance over the longer of the two texts, mean over pictures',
  }
  question = 'are the words there that were asked for?'
  return Report(tuple(lines), protocol('ocr', question, subject, options, results, **said), sheets)


@functools.cache
def reader() -> Read:
  """What reads pictures [N, R, R, 3] uint8: the lines of each, joined by spaces.

  A picture is read once: the true ones are those of every run.

  Raises:
    UserError: the packages for it are not installed.
  """
  check_installed()
  from rapidocr import RapidOCR

  engine, known = RapidOCR(params=_SETTINGS), {}

  def text(image: np.ndarray) -> str:
    key = (image.shape, image.tobytes())
    if key not in known:
      lines = engine(enlarged(image)[..., ::-1]).txts or ()  # it takes blue for the first channel
      known[key] = ' '.join(line.strip() for line in lines)
    return known[key]

  def read(images: np.ndarray) -> list[str]:
    return [text(image) for image in tqdm(images, desc='reading', unit='picture')]

  return read


def enlarged(image: np.ndarray) -> np.ndarray:
  """The picture uint8 [R, R, 3] as large as the reader likes it, with a white border."""
  factor = max(1, round(_SIDE / len(image)))
  large = Image.fromarray(image).resize((factor * len(image),) * 2, Image.Resampling.BICUBIC)
  return np.pad(np.asarray(large), ((_BORDER,) * 2, (_BORDER,) * 2, (0, 0)), constant_values=255)


def measure(read: Sequence[str], asked: Sequence[str]) -> Result:
  """Compares what was read of N pictures with the words that they should show."""
  from rapidfuzz.distance import Levenshtein

  counted = np.asarray([matches(*pair) for pair in zip(read, asked, strict=True)])
  errors = [Levenshtein.distance(a, b) / max(len(a), len(b), 1) for a, b in zip(read, asked)]
  return Result(*(int(total) for total in counted.sum(0)), np.asarray(errors))


def matches(read: str, asked: str) -> tuple[int, int, int]:
  """How many words were asked for, were read, and are of both."""
  from rapidfuzz import fuzz

  words, free = read.lower().split(), asked.lower().split()
  count = len(free)
  for word in words:
    alike = (i for i, other in enumerate(free) if round(fuzz.ratio(word, other)) >= ALIKE)
    place = next(alike, None)
    if place is not None:
      del free[place]
  return count, len(words), count - len(free)


def table(split: str, found: dict[str, Result]) -> list[str]:
  """The results of one split as aligned lines."""
  count = len(next(iter(found.values())).errors)
  lines = [
    f'split {split}: words read of {count} pictures, and characters wrong of those of a picture',
    f'  {"pictures":28}{"recall":>9}{"precision":>11}{"F1":>8}{"characters wrong":>18}'
    f'{"pictures without error":>24}',
  ]
  for name, result in found.items():
    lines.append(
      f'  {name:28}{result.recall:>9.1%}{result.precision:>11.1%}{result.f1:>8.1%}'
      f'{result.error_rate:>18.1%}{np.mean(result.errors == 0):>24.1%}'
    )
  return lines


def _quoted(texts: Sequence[str]) -> list[str]:
  return [f'"{text}"' for text in texts]
