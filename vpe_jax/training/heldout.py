"""Held-out losses along the way: every loss term on examples that no step has seen."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax

from vpe_jax import sharding
from vpe_jax.checkpoints.frozen import Frozen
from vpe_jax.config import FOLDER, FOLDERS, TFDS, Config
from vpe_jax.contracts import Array, Examples, Stage, System
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.training.state import State, weights
from vpe_jax.training.step import make_eval_step

SPLIT = 'combination'
BATCHES = 4  # the same ones each time


def has_split(source: str) -> bool:
  """Whether a data source keeps anything out of training."""
  return source != 'synthetic' and not source.startswith((FOLDER, FOLDERS, TFDS))


def with_all_losses(stages: Sequence[Stage], index: int) -> Stage:
  """A stage of a run with the losses of all its stages, foreign ones at weight 0."""
  names = (name for stage in stages for name in (*stage.losses, *stage.watched))
  own = stages[index]
  return dataclasses.replace(own, losses={**dict.fromkeys(names, 0.0), **own.losses})


class HeldOut:
  """Evaluates all losses of all stages, also those that the running stage does not train on."""

  def __init__(self, config: Config, system: System, frozen: Frozen, mesh: jax.sharding.Mesh):
    self._config = config
    self._system = system
    self._frozen = frozen
    self._mesh = mesh
    self._index = -1
    self._batches: list[Examples] = []
    if config.log.evaluate and not has_split(config.data.source) and jax.process_index() == 0:
      print(f'held-out losses: none, {config.data.source} has no held-out split', flush=True)

  def evaluate(self, state: State, key: Array) -> dict[str, float]:
    """`eval/<loss>` on the held-out split, with the averaged parameters where there are any."""
    if not has_split(self._config.data.source):
      return {}
    index = int(state['stage'])
    if index != self._index:
      self._index = index
      self._step = make_eval_step(self._system, with_all_losses(self._system.stages, index))
      self._batches = self._read(self._config.batch_size[index])
    params = weights(state)
    totals: dict[str, list[float]] = {}
    for batch in self._batches:
      sums, counts = jax.device_get(
        self._step(params, self._frozen.params, batch, key, state['stage_step'])
      )
      for name, value in sums.items():
        total = totals.setdefault(name, [0.0, 0.0])
        total[0] += float(value)
        total[1] += float(counts[name])
    return {f'eval/{name}': value / max(count, 1.0) for name, (value, count) in totals.items()}

  def _read(self, batch_size: int) -> list[Examples]:
    """The batches on the devices, encoded once where the system has encoders."""
    data = Pipeline(self._config.data, self._config.seed, split=SPLIT)
    place = lambda batch: sharding.put_batch(batch, self._mesh)
    with data.batches(0, batch_size, jax.process_index(), jax.process_count()) as batches:
      read = [place(batch) for batch in itertools.islice(batches, BATCHES)]
    if self._frozen.encode is None:
      return read
    seen = {'image': None, 'reference': None}
    return [dataclasses.replace(self._frozen.with_codes(batch), **seen) for batch in read]
