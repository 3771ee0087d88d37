"""Losses on held-out data: every loss term on examples outside the training split."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from vpe_jax import sharding
from vpe_jax.config import DataConfig
from vpe_jax.contracts import Array, Batch, Params, Stage, System, UserError
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.records import NoHeldOutSplit
from vpe_jax.data.sources import open_source
from vpe_jax.evaluation import intervals
from vpe_jax.evaluation.evaluator import Lowered, Subject
from vpe_jax.evaluation.report import Report, number

SPLIT = 'combination'
_NONE = 'held-out losses: none, the data source has no held-out split'
_CURE = ' (data.held_out makes one)'  # for the user's folders

Sums = dict[str, Array]
# (params, frozen, batch, rng, stage_step) -> (sums, counts) of each loss term; jitted.
EvalStep = jax.stages.Wrapped


@dataclasses.dataclass
class HeldOut:
  """Losses of all stages on a held-out split; see vpe_jax.evaluation.evaluator.Evaluator.

  Figures are `eval/<loss>`, including losses that the current stage does not train on; their
  intervals resample the batches. There are none if the data source has no held-out split.

  Attributes:
    batches: number of batches; they are the same each time.
  """

  requires: ClassVar[tuple[type, ...]] = ()
  tasks: ClassVar[tuple[str, ...]] = ()
  folder: ClassVar[str] = 'evaluation'

  batches: int = 4

  def __post_init__(self) -> None:
    self._steps: dict[tuple[System, int], EvalStep] = {}  # by system and index of the stage
    self._batches: tuple[tuple[System, int] | None, list[Batch]] = (None, [])

  def check(self) -> None:
    """See Evaluator."""
    if self.batches < 1:
      raise UserError(f'batches is {self.batches}: at least 1 is needed')

  def programs(self, subject: Subject) -> list[Lowered]:
    """See Evaluator."""
    if not has_split(subject.system.config.data):
      return []
    spec = subject.system.batch_spec(_batch_size(subject))
    place = sharding.batch_sharding(subject.mesh)
    read = sharding.abstract(spec.batch(cached=False), place)
    evaluated, lowered = read, []
    if spec.cacheable:
      evaluated = sharding.abstract(spec.batch(cached=True), place)
      lowered = [subject.frozen.lower_encode(read, subject.key)]
    arguments = (subject.params, subject.frozen.params, evaluated, subject.key, subject.stage_step)
    return [*lowered, self._step_of(subject).lower(*arguments)]

  def run(self, subject: Subject) -> Report:
    """The mean of each loss over the held-out batches."""
    data = subject.system.config.data
    if not has_split(data):
      return Report({}, (_NONE + (_CURE if data.in_folders else ''),))
    step, totals = self._step_of(subject), {}
    # The networks shard their activations over the mesh.
    with jax.set_mesh(subject.mesh):
      for batch in self._batches_of(subject):
        sums, counts = jax.device_get(
          step(subject.params, subject.frozen.params, batch, subject.key, subject.stage_step)
        )
        for name, value in sums.items():
          totals.setdefault(name, []).append((float(value), float(counts[name])))
    figures = {f'eval/{name}': intervals.ratio(*zip(*pairs)) for name, pairs in totals.items()}
    lines = [f'  {name:24}{number(figure, places=4)}' for name, figure in figures.items()]
    return Report(figures, tuple(lines))

  def _step_of(self, subject: Subject) -> EvalStep:
    """The jitted function of the subject's stage, built once."""
    key = subject.system, subject.stage_index
    if key not in self._steps:
      stage = with_all_losses(subject.system.stages, subject.stage_index)
      self._steps[key] = make_eval_step(subject.system, stage)
    return self._steps[key]

  def _batches_of(self, subject: Subject) -> list[Batch]:
    """The batches of the subject's stage; those of the last stage and system are kept."""
    key = subject.system, subject.stage_index
    if self._batches[0] != key:
      self._batches = key, self._read(subject)
    return self._batches[1]

  def _read(self, subject: Subject) -> list[Batch]:
    """Reads the batches onto the devices; cacheable entries are encoded once."""
    size = _batch_size(subject)
    data = Pipeline.of(subject.system, SPLIT)
    place = lambda batch: sharding.put_batch(batch, subject.mesh)
    with data.batches(0, size, *sharding.host_part(subject.mesh)) as batches:
      placed = [place(batch) for batch in itertools.islice(batches, self.batches)]
    spec = subject.system.batch_spec(size)
    if not spec.cacheable:
      return placed
    inputs = spec.input_names(cached=True)
    return [_as_cached(subject, batch, inputs, spec.cacheable) for batch in placed]


def _batch_size(subject: Subject) -> int:
  """The batch size of the stage, rounded up to a multiple of the batch shards of the mesh."""
  size = subject.system.config.batch_size[subject.stage_index]
  # A finished run may be evaluated on another number of devices.
  shards = math.prod(subject.mesh.shape[axis] for axis in sharding.BATCH_AXES)
  return -(-size // shards) * shards


def has_split(data: DataConfig) -> bool:
  """Whether the data source has held-out splits."""
  if data.is_user_data:
    return data.held_out > 0
  try:
    open_source(data, SPLIT)
  except NoHeldOutSplit:
    return False
  return True


def with_all_losses(stages: Sequence[Stage], index: int) -> Stage:
  """A stage with the losses of all stages; those of other stages have weight 0."""
  names = (name for stage in stages for name in (*stage.losses, *stage.monitored))
  own = stages[index]
  return dataclasses.replace(own, losses={**dict.fromkeys(names, 0.0), **own.losses})


def make_eval_step(system: System, stage: Stage) -> EvalStep:
  """Builds evaluate(params, frozen, batch, rng, stage_step) -> (sums, counts) of each loss term."""
  stage = dataclasses.replace(stage, training=False)

  def evaluate(
    params: Params, frozen: Params, batch: Batch, rng: Array, stage_step: Array
  ) -> tuple[Sums, Sums]:
    terms = system.losses(params, frozen, batch, rng, stage_step, stage)
    sums = {name: jnp.float32(term.sum) for name, term in terms.items()}
    return sums, {name: jnp.float32(term.count) for name, term in terms.items()}

  return jax.jit(evaluate, compiler_options=sharding.compiler_options())


def _as_cached(
  subject: Subject, batch: Batch, inputs: frozenset[str], cacheable: frozenset[str]
) -> Batch:
  """The batch in the form that a cache would provide."""
  encoded = subject.frozen.encode_batch(batch, subject.key).encoded
  return Batch(
    batch.example,
    {name: batch.inputs[name] for name in inputs},
    {name: encoded[name] for name in cacheable},
  )
