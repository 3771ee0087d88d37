"""Class-conditional generation: class accuracy and Frechet distance against the run's own data.

N training images are the reference, and N others the row `ground truth`. One image is generated for
the class of each ground-truth image, so both rows have the same classes. An image counts as correct
if the nearest reference image, by cosine similarity, has the same class. The Frechet distance
compares the vectors of a row with those of the reference. The distance of the row `ground truth` is
its floor, which is above 0 even for two halves of the same data.

The vectors come from the shipped evaluator network, which was trained on embedded data, not from
Inception. The figures are comparable between runs on the same data, not with published results.
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
from vpe_jax.evaluation.evaluator import Lowered, Subject
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import Report, Row, check_options, protocol, wilson_interval

SPLIT = 'train'  # name of the sheet; the reference is training data


@dataclasses.dataclass(frozen=True)
class Result:
  """Scores of one set of images.

  Attributes:
    accuracy: share of images whose nearest reference image has their class.
    images: number of images.
    frechet: Frechet distance to the reference; None for the permuted row.
  """

  accuracy: float
  images: int
  frechet: float | None = None

  def summary(self) -> dict[str, Any]:
    """Plain numbers, for a table or JSON."""
    interval = list(wilson_interval(self.accuracy, self.images))
    return {**dataclasses.asdict(self), 'interval95': interval}


@dataclasses.dataclass(frozen=True)
class ClassBenchmark:
  """Images of the classes of the run's own data; see vpe_jax.evaluation.evaluator.Evaluator.

  Attributes:
    captions: number of generated images, and of reference images.
    seed: seed of the selection of images.
    evaluator_network: weights of the evaluator network.
  """

  requires = (Samples,)
  tasks = ('classes',)
  folder = 'evaluation'

  captions: int = 512
  seed: int = 0
  evaluator_network: str = 'assets:evaluator_network'

  def check(self) -> None:
    """See Evaluator."""
    check_options(self.captions, (), self.seed)

  def programs(self, subject: Subject) -> list[Lowered]:
    """See Evaluator."""
    return subject.sampling_programs()

  def run(self, subject: Subject) -> Report:
    """Nearest-neighbour class accuracy and Frechet distance of true and generated images.

    Raises:
      UserError: the data has too few images.
    """
    network, count = EvaluatorNetwork.load(self.evaluator_network), self.captions
    data = subject.system.config.data
    images, names = ground_truth_images(data, 2 * count, self.seed)
    reference, classes = names[:count], names[count:]
    generated = subject.sample(classes.tolist())
    reference_vectors = network.images(images[:count])
    outcomes = {}
    for row, pixels in {'ground truth': images[count:], 'generated': generated}.items():
      vectors = network.images(pixels)
      nearest = reference[np.argmax(vectors @ reference_vectors.T, axis=1)]
      accuracy = float(np.mean(nearest == classes))
      outcomes[row] = Result(accuracy, count, frechet.distance(vectors, reference_vectors))
    outcomes['generated, classes permuted'] = Result(permuted(nearest, classes), count)
    chance = agreement(reference, classes)
    results = {
      'rows': {row: result.summary() for row, result in outcomes.items()},
      'chance': chance,
      'classes': dict(collections.Counter(classes.tolist()).most_common()),
      'reference': dict(collections.Counter(reference.tolist()).most_common()),
    }
    details = {
      'data': dataclasses.asdict(data),
      'frechet': 'to the reference, with vectors of the evaluator network, not of Inception',
      'permuted': 'nearest reference images against the classes of all other images',
      'evaluator_network_checkpoint': network.fingerprint,
    }
    question = 'does the nearest reference image have the right class?'
    sheet = (
      Row.first('true', images[count:], classes.tolist()),
      Row.first('generated', generated),
    )
    numbers = {
      'classes/accuracy': outcomes['generated'].accuracy,
      'classes/frechet': outcomes['generated'].frechet,
    }
    record = protocol(self, 'classes', question, subject, results, **details)
    return Report(numbers, table(outcomes, chance), record, {SPLIT: sheet})


def ground_truth_images(data: DataConfig, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Distinct training images, uint8 [count, R, R, 3], and their classes [count].

  Args:
    data: data section of the config.
    count: number of images.
    seed: seed of the shuffle.

  Raises:
    UserError: the data has fewer distinct images.
  """
  pipeline = Pipeline(data, seed, prompt_and_image(data))
  examples: dict[bytes, tuple[np.ndarray, str]] = {}
  for position in range(len(pipeline)):
    index = pipeline.index_at(position)
    image = render(pipeline.record(index), data.image_size)
    examples.setdefault(image.tobytes(), (image, pipeline.prompt(index)))
    if len(examples) == count:
      images, names = zip(*examples.values())
      return np.stack(images), np.asarray(names)
  raise UserError(
    f"the run's data has {len(examples)} distinct images, and half of them are the reference: set "
    f'--captions={len(examples) // 2} or fewer'
  )


def agreement(reference: np.ndarray, classes: np.ndarray) -> float:
  """Accuracy by chance: probability that a random reference image has the right class."""
  return _pairs(reference, classes) / (len(reference) * len(classes))


def permuted(nearest: np.ndarray, classes: np.ndarray) -> float:
  """The control: probability that the nearest class of an image is that of a random other image.

  Args:
    nearest: classes [N] of the nearest reference images.
    classes: classes [N] of the images.
  """
  own = int(np.sum(nearest == classes))
  return (_pairs(nearest, classes) - own) / (len(classes) * (len(classes) - 1))


def _pairs(ours: np.ndarray, theirs: np.ndarray) -> int:
  """Number of equal pairs among all pairs of an element of `ours` and one of `theirs`."""
  counts = collections.Counter(theirs.tolist())
  return sum(counts[name] for name in ours.tolist())


def table(outcomes: dict[str, Result], chance: float) -> tuple[str, ...]:
  """The results as aligned lines."""
  lines = [
    f'accuracy: the nearest of {outcomes["generated"].images} reference images has the right class '
    f'(chance {chance:.1%}); Frechet: distance to the reference, in vectors of the evaluator '
    'network, x 1000',
    f'  {"images":32}{"accuracy":>13}{"95% interval":>18}{"Frechet":>10}',
  ]
  for row, result in outcomes.items():
    low, high = wilson_interval(result.accuracy, result.images)
    distance = '-' if result.frechet is None else f'{1000 * result.frechet:.1f}'
    lines.append(
      f'  {row:32}{result.accuracy:>13.1%}{f"{low:.1%} to {high:.1%}":>18}{distance:>10}'
    )
  return tuple(lines)
