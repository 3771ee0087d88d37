"""Held-out losses along the way: every loss term on examples that no step has seen."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax

from vpe_jax import sharding
from vpe_jax.checkpoints.frozen import Frozen
from vpe_jax.config import FOLDER, FOLDERS, TFDS, Config
from vpe_jax.contracts import Array, Batch, Stage, System
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
  names = (name for stage in stages for name in (*stage.losses, *stage.monitored))
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
    self._batches: list[Batch] = []
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
      self._batches = self._read(self._config.batch_size[index], key)
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

  def _read(self, batch_size: int, key: Array) -> list[Batch]:
    """The batches on the devices; entries that a cache may store are encoded once."""
    data = Pipeline.of(self._system, SPLIT)
    place = lambda batch: sharding.put_batch(batch, self._mesh)
    with data.batches(0, batch_size, jax.process_index(), jax.process_count()) as batches:
      read = [place(batch) for batch in itertools.islice(batches, BATCHES)]
    spec = self._system.batch_spec(batch_size)
    if not spec.cacheable:
      return read
    names = spec.input_names(cached=True)
    return [self._cached(batch, names, spec.cacheable, key) for batch in read]

  def _cached(
    self, batch: Batch, inputs: frozenset[str], cacheable: frozenset[str], key: Array
  ) -> Batch:
    """The batch as it would come from a cache."""
    encoded = self._frozen.encode(self._frozen.params, batch.inputs, key)
    return Batch(
      batch.example,
      {name: batch.inputs[name] for name in inputs},
      {name: encoded[name] for name in cacheable},
    )
