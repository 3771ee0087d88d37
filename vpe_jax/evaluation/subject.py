"""From a generator to what benchmarks see of it: a Subject."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from vpe_jax.config import CLASSES, DataConfig, SampleConfig
from vpe_jax.contracts import Edits, supports
from vpe_jax.evaluation.report import Planner, Subject, Task
from vpe_jax.sampling.pictures import Picture
from vpe_jax.sampling.plans import Plans


def subject(generator: Any, settings: SampleConfig, seed: int) -> Subject:
  """What a generator draws with some settings and a seed; its progress is shown.

  Args:
    generator: a vpe_jax.generator.Generator.
    settings: of the drawing.
    seed: of the drawing.
  """

  def drawn(pictures: Callable[..., list[Picture]], count: int) -> np.ndarray:
    with tqdm(total=count, desc='drawing', unit='picture') as bar:
      found = pictures(seed, settings, progress=lambda done, _: bar.update(done - bar.n))
    return np.stack([picture.image for picture in found])

  def draw(captions: list[str]) -> np.ndarray:
    return drawn(functools.partial(generator, captions, 1), len(captions))

  def read(pictures: np.ndarray, captions: Sequence[str]) -> Plans:
    # In the places that `draw` gives them: a picture comes from the same noise both ways.
    count = collections.defaultdict(itertools.count)
    index = tuple(next(count[caption]) for caption in captions)
    return dataclasses.replace(generator.read(list(pictures), captions), index=index)

  planner = None
  if generator.has_plans:
    planner = Planner(
      plan=lambda captions, n: generator.plan(captions, n, seed, settings),
      score=generator.score,
      render=lambda plans: drawn(functools.partial(generator.render, plans), len(plans)),
      read=read,
      rankers=generator.rankers,
    )
  data = generator.system.config.data
  edits = supports(generator.system, Edits)
  return Subject(
    draw=draw,
    image_size=data.image_size,
    description=generator.describe(settings),
    planner=planner,
    task='edits' if edits else _task(data),
    editing=(lambda before: subject(generator.editing(before), settings, seed)) if edits else None,
    data=data,
  )


def _task(data: DataConfig) -> Task:
  """What a model that doesn't edit draws from."""
  if data.tokenizer.startswith(CLASSES):
    return 'classes'
  return 'words' if data.source == 'words' else 'captions'
