"""Class-conditional generation: class accuracy and Frechet distance against the run's own data.

As many true images as are generated are the reference, as many others of the same data the row
`true images`; one image is generated of the class of each of the latter, so that both rows have the
same classes. An image is right if the reference image whose vector is nearest, in cosine, is of its
class. The Frechet distance compares the vectors of a row with those of the reference; the distance
of the true images is the floor, as it isn't 0 between two halves of the same data.

The vectors come from the shipped evaluator network, which was trained on embedded data, not from
Inception: the figures compare runs on the same data with one another, and with nothing published.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from vpe_jax.config import DataConfig
from vpe_jax.contracts import Samples, UserError
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.preprocess import prompt_and_image
from vpe_jax.data.records import render
from vpe_jax.evaluation import frechet
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import Report, Row, check_options, protocol
from vpe_jax.evaluation.retrieval import wilson

SPLIT = 'train'  # name of the sheet: the reference of a class is training data


@dataclasses.dataclass(frozen=True)
class Result:
  """Scores of one set of images.

  Attributes:
    right: share of images whose nearest reference image is of their class.
    images: number of images.
    frechet: distance of their vectors to the reference's; None where another row has it.
  """

  right: float
  images: int
  frechet: float | None = None

  def summary(self) -> dict[str, Any]:
    """Plain numbers, for a table or JSON."""
    interval = list(wilson(self.right, self.images))
    return {**dataclasses.asdict(self), 'interval95': interval}


@dataclasses.dataclass(frozen=True)
class ClassBenchmark:
  """Images of the classes of a run's own data; see vpe_jax.evaluation.evaluator.Evaluator.

  Attributes:
    captions: number of generated images, and of reference images.
    seed: of the choice of images.
    judge: weights of the evaluator network.
  """

  requires = (Samples,)
  tasks = ('classes',)
  folder = 'evaluation'

  captions: int = 512
  seed: int = 0
  judge: str = 'assets:judge'

  def check(self) -> None:
    """See Evaluator."""
    check_options(self.captions, (), self.seed)

  def run(self, subject: Subject) -> Report:
    """Nearest-neighbour class accuracy and Frechet distance of true and generated images.

    Raises:
      UserError: the data has too few images.
    """
    judge, count = EvaluatorNetwork.load(self.judge), self.captions
    data = subject.system.config.data
    images, names = true_images(data, 2 * count, self.seed)
    reference, classes = names[:count], names[count:]
    generated = subject.sample(classes.tolist())
    known = judge.images(images[:count])
    outcomes = {}
    for row, shown in {'true images': images[count:], 'generated': generated}.items():
      vectors = judge.images(shown)
      nearest = reference[np.argmax(vectors @ known.T, axis=1)]
      right = float(np.mean(nearest == classes))
      outcomes[row] = Result(right, count, frechet.distance(vectors, known))
    outcomes['generated, classes permuted'] = Result(permuted(nearest, classes), count)
    chance = agreement(reference, classes)
    results = {
      'rows': {row: result.summary() for row, result in outcomes.items()},
      'chance': chance,
      'fields': dict(collections.Counter(classes.tolist()).most_common()),
      'reference': dict(collections.Counter(reference.tolist()).most_common()),
    }
    measured = {
      'data': dataclasses.asdict(data),
      'frechet': 'of the vectors of the evaluator network, not of Inception, to the reference',
      'permuted': 'the nearest reference images against the classes of all other images',
      'judge_checkpoint': judge.fingerprint,
    }
    question = 'is the nearest reference image of the right class?'
    sheet = (
      Row.first('true', images[count:], classes.tolist()),
      Row.first('generated', generated),
    )
    numbers = {
      'classes/right': outcomes['generated'].right,
      'classes/frechet': outcomes['generated'].frechet,
    }
    record = protocol(self, 'classes', question, subject, results, **measured)
    return Report(numbers, table(outcomes, chance), record, {SPLIT: sheet})


def true_images(data: DataConfig, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Distinct training images, uint8 [count, R, R, 3], and their classes.

  Their order is the run's shuffle with another seed.

  Raises:
    UserError: there are fewer.
  """
  pipeline = Pipeline(data, seed, prompt_and_image(data))
  outcomes: dict[bytes, tuple[np.ndarray, str]] = {}
  for place in range(len(pipeline)):
    index = pipeline.index_at(place)
    image = render(pipeline.record(index), data.image_size)
    outcomes.setdefault(image.tobytes(), (image, pipeline.prompt(index)))
    if len(outcomes) == count:
      images, names = zip(*outcomes.values())
      return np.stack(images), np.asarray(names)
  raise UserError(
    f"the run's data has {len(outcomes)} different images, and half are the reference of the other "
    f'half: --captions={len(outcomes) // 2} or fewer are possible'
  )


def agreement(reference: np.ndarray, classes: np.ndarray) -> float:
  """Chance: how often a random reference image is of the right class."""
  return _pairs(reference, classes) / (len(reference) * len(classes))


def permuted(nearest: np.ndarray, classes: np.ndarray) -> float:
  """The control: how often the classes [N] of the nearest are those of other images.

  The mean over all pairs of an image and another one's class.
  """
  own = int(np.sum(nearest == classes))
  return (_pairs(nearest, classes) - own) / (len(classes) * (len(classes) - 1))


def _pairs(ours: np.ndarray, theirs: np.ndarray) -> int:
  """Of all pairs of one of ours and one of theirs, how many are equal."""
  counted = collections.Counter(theirs.tolist())
  return sum(counted[name] for name in ours.tolist())


def table(outcomes: dict[str, Result], chance: float) -> tuple[str, ...]:
  """The results as aligned lines."""
  lines = [
    f'the nearest of {outcomes["generated"].images} reference images is of the right class '
    f"(chance {chance:.1%}); Frechet distance of the judge's vectors to theirs, x 1000",
    f'  {"images":32}{"right class":>13}{"95% interval":>18}{"Frechet":>10}',
  ]
  for row, result in outcomes.items():
    low, high = wilson(result.right, result.images)
    far = '-' if result.frechet is None else f'{1000 * result.frechet:.1f}'
    lines.append(f'  {row:32}{result.right:>13.1%}{f"{low:.1%} to {high:.1%}":>18}{far:>10}')
  return tuple(lines)
