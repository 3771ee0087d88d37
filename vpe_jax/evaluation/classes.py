"""Class-conditional generation: class accuracy and Frechet distance against the run's own data.

N training images are the reference, and N others the row `ground truth`. One image is generated for
the class of each ground-truth image, so all rows have the same classes. An image counts as correct
if the nearest reference image, by cosine similarity, has the same class. The Frechet distance
compares the vectors of a row with those of the reference. The distance of the row `ground truth` is
its floor, which is above 0 even for two halves of the same data.

Two rows tell the parts of a model apart: ground-truth images through the image codec alone, and
images that the model renders from drafts of the ground-truth images, where it has drafts.

The vectors come from the shipped evaluator network, which was trained on embedded data, not from
Inception. The figures are comparable between runs on the same data, not with published results.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Mapping

import numpy as np

from vpe_jax.config import DataConfig
from vpe_jax.contracts import Samples, UserError
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.preprocess import prompt_and_image
from vpe_jax.data.records import BadRecord, render
from vpe_jax.evaluation import frechet, intervals, report
from vpe_jax.evaluation.evaluator import Lowered, Subject, rows_of
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.intervals import Figure
from vpe_jax.evaluation.report import (
  GENERATED,
  GROUND_TRUTH,
  Report,
  Row,
  check_options,
  differences,
  hash_items,
  model_figures,
  number,
  percent,
  protocol,
  summaries,
)

SPLIT = 'train'  # name of the sheet; the reference is training data
PERMUTED = 'generated, classes permuted'


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
    check_options(self.captions, (SPLIT,), self.seed)

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
    reference_vectors = network.images(images[:count])
    rows = rows_of(subject, classes.tolist(), images[count:])
    outcomes = {}
    for row, pixels in rows.items():
      vectors = network.images(pixels)
      nearest = reference[np.argmax(vectors @ reference_vectors.T, axis=1)]
      outcomes[row] = {
        'accuracy': intervals.share(nearest == classes),
        'frechet': frechet.figure(vectors, reference_vectors),
      }
      if row == GENERATED:
        control = {'accuracy': intervals.share(permuted(nearest, classes))}
    chance = agreement(reference, classes)
    results = {
      'rows': {row: summaries(figures) for row, figures in {**outcomes, PERMUTED: control}.items()},
      'differences': {name: summaries(pair) for name, pair in differences(outcomes).items()},
      'images': count,
      'chance': chance,
      'frechet_bias_of_resamples': {row: f['frechet'].bias for row, f in outcomes.items()},
      'classes': dict(collections.Counter(classes.tolist()).most_common()),
      'reference': dict(collections.Counter(reference.tolist()).most_common()),
    }
    details = {
      'data': dataclasses.asdict(data),
      'frechet': 'to the reference, with vectors of the evaluator network, not of Inception',
      'frechet_intervals': f'{frechet.RESAMPLES} resamples of the images of the row, with a fixed '
      'reference, minus their mean difference from the distance (frechet_bias_of_resamples)',
      'permuted': 'nearest reference images against the classes of all other images',
      'evaluator_network_checkpoint': network.fingerprint,
    }
    question = 'does the nearest reference image have the right class?'
    sheet = tuple(
      Row.first(name, pixels, classes.tolist() if name == GROUND_TRUTH else ())
      for name, pixels in rows.items()
    )
    figures = model_figures('classes', outcomes, ('accuracy', 'frechet'))
    record = protocol(self, 'classes', question, subject, results, **details)
    lines = table({**outcomes, PERMUTED: control}, chance)
    items = hash_items(names.tolist(), [hashlib.sha256(images.tobytes()).hexdigest()])
    return Report(figures, lines, record, {SPLIT: sheet}, items)


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
    try:
      image = render(pipeline.record(index), data.image_size)
      examples.setdefault(image.tobytes(), (image, pipeline.prompt(index)))
    except BadRecord:  # Training leaves it out, too.
      continue
    if len(examples) == count:
      images, names = zip(*examples.values())
      return np.stack(images), np.asarray(names)
  largest = len(examples) // 2
  cure = f'set captions to {largest} or fewer' if largest > 1 else 'at least 4 are needed'
  raise UserError(
    f"the run's data has {len(examples)} distinct images, and half of them are the reference: "
    f'{cure}'
  )


def agreement(reference: np.ndarray, classes: np.ndarray) -> float:
  """Accuracy by chance: probability that a random reference image has the right class."""
  counts = collections.Counter(reference.tolist())
  return sum(counts[name] for name in classes.tolist()) / (len(reference) * len(classes))


def permuted(nearest: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """The control [N]: probability that the nearest class of an image is that of a random other one.

  Args:
    nearest: classes [N] of the nearest reference images.
    classes: classes [N] of the images.
  """
  counts = collections.Counter(classes.tolist())
  pairs = np.asarray([counts[name] for name in nearest.tolist()]) - (nearest == classes)
  return pairs / (len(classes) - 1)


def table(outcomes: Mapping[str, Mapping[str, Figure]], chance: float) -> tuple[str, ...]:
  """The results as aligned lines; figures of each row are `accuracy` and perhaps `frechet`."""
  count = outcomes[GENERATED]['accuracy'].count
  title = (
    f'accuracy: the nearest of {count} reference images has the right class (chance {chance:.1%}); '
    'Frechet: distance to the reference, in vectors of the evaluator network, x 1000; 95% intervals'
  )
  distance = functools.partial(number, places=1, scale=1000)
  columns = {'accuracy': ('accuracy', percent), 'Frechet': ('frechet', distance)}
  return (title, *report.table(columns, outcomes))
