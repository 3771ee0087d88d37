"""Do pictures of a class look like the data's pictures of that class, and like the data as a whole?

For models that draw from a class. As many true pictures as are asked for are the reference, as
many others of the same data the row `true images`; a picture is drawn of the class of each of the
latter, so that both rows have the same classes. A picture is right if the reference picture whose
vector is nearest to its own, in cosine, is of its class. The Frechet distance compares the vectors
of a row with those of the reference; that of the true images is the floor, as it isn't 0 between
two halves of the same data.

The network that makes the vectors is the shipped judge, which was trained on embedded data, and not
Inception: its figures compare runs on the same data with one another, and with nothing published.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.preprocess import prompt_and_image
from vpe_jax.data.records import render
from vpe_jax.evaluation import frechet
from vpe_jax.evaluation.judge import Judge
from vpe_jax.evaluation.report import Options, Report, Row, Subject, protocol
from vpe_jax.evaluation.retrieval import wilson

SPLIT = 'train'  # what its sheet is called by: the reference of a class is what was trained on


@dataclasses.dataclass(frozen=True)
class Result:
  """How one set of pictures did.

  Attributes:
    right: share of pictures whose nearest reference picture is of their class.
    pictures: how many there are.
    frechet: distance of their vectors to the reference's; None where it is another row's.
  """

  right: float
  pictures: int
  frechet: float | None = None

  def summary(self) -> dict[str, Any]:
    """Plain numbers, for a table or JSON."""
    interval = list(wilson(self.right, self.pictures))
    return {**dataclasses.asdict(self), 'interval95': interval}


def classes_report(subject: Subject, options: Options) -> Report:
  """Pictures of the classes of a run's own data, beside that data.

  Raises:
    UserError: the data has too few pictures.
  """
  judge, count = Judge.load(options.judge), options.captions
  images, names = true_pictures(subject.data, 2 * count, options.seed)
  reference, asked = names[:count], names[count:]
  drawn = subject.draw(asked.tolist())
  known = judge.images(images[:count])
  found = {}
  for row, shown in {'true images': images[count:], 'generated': drawn}.items():
    vectors = judge.images(shown)
    nearest = reference[np.argmax(vectors @ known.T, axis=1)]
    right = float(np.mean(nearest == asked))
    found[row] = Result(right, count, frechet.distance(vectors, known))
  found['generated, classes permuted'] = Result(permuted(nearest, asked), count)
  chance = agreement(reference, asked)
  results = {
    'rows': {row: result.summary() for row, result in found.items()},
    'chance': chance,
    'asked': dict(collections.Counter(asked.tolist()).most_common()),
    'reference': dict(collections.Counter(reference.tolist()).most_common()),
  }
  said = {
    'data': dataclasses.asdict(subject.data),
    'frechet': 'of the vectors of the judge, not of Inception, to those of the reference',
    'permuted': 'the nearest reference pictures against the classes of all other pictures',
    'judge_checkpoint': judge.fingerprint,
  }
  question = 'is the nearest reference picture of the class that was asked for?'
  sheet = (
    Row.first('true', images[count:], asked.tolist()),
    Row.first('generated', drawn),
  )
  return Report(
    table(found, chance),
    protocol('classes', question, subject, options, results, **said),
    {SPLIT: sheet},
  )


def true_pictures(data: DataConfig, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Different pictures of what a run was trained on, uint8 [count, R, R, 3], and their classes.

  They come in the order of the run's own shuffle with another seed.

  Raises:
    UserError: there are fewer.
  """
  pipeline = Pipeline(data, seed, prompt_and_image(data))
  found: dict[bytes, tuple[np.ndarray, str]] = {}
  for place in range(len(pipeline)):
    index = pipeline.index_at(place)
    image = render(pipeline.record(index), data.image_size)
    found.setdefault(image.tobytes(), (image, pipeline.prompt(index)))
    if len(found) == count:
      images, names = zip(*found.values())
      return np.stack(images), np.asarray(names)
  raise UserError(
    f"the run's data has {len(found)} different pictures, and half are the reference of the other "
    f'half: --captions={len(found) // 2} or fewer are possible'
  )


def agreement(reference: np.ndarray, asked: np.ndarray) -> float:
  """Chance: how often a reference picture taken blindly is of the class that is asked for."""
  return _pairs(reference, asked) / (len(reference) * len(asked))


def permuted(nearest: np.ndarray, asked: np.ndarray) -> float:
  """The control: how often the classes [N] of the nearest are those of other pictures.

  It is the mean over all pairs of a picture and another one's class.
  """
  own = int(np.sum(nearest == asked))
  return (_pairs(nearest, asked) - own) / (len(asked) * (len(asked) - 1))


def _pairs(ours: np.ndarray, theirs: np.ndarray) -> int:
  """Of all pairs of one of ours and one of theirs, how many are equal."""
  counted = collections.Counter(theirs.tolist())
  return sum(counted[name] for name in ours.tolist())


def table(found: dict[str, Result], chance: float) -> tuple[str, ...]:
  """The results as aligned lines."""
  lines = [
    f'the nearest of {found["generated"].pictures} reference pictures is of the class asked for '
    f"(chance {chance:.1%}); Frechet distance of the judge's vectors to theirs, x 1000",
    f'  {"pictures":32}{"right class":>13}{"95% interval":>18}{"Frechet":>10}',
  ]
  for row, result in found.items():
    low, high = wilson(result.right, result.pictures)
    far = '-' if result.frechet is None else f'{1000 * result.frechet:.1f}'
    lines.append(f'  {row:32}{result.right:>13.1%}{f"{low:.1%} to {high:.1%}":>18}{far:>10}')
  return tuple(lines)
