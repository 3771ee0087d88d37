"""The interface of evaluators, and the model that they evaluate.

An evaluator is a dataclass whose fields are its options. `config.evals` lists the evaluators of the
training loop; `vpe_jax.evaluate` runs the same ones on a finished run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
import yaml

from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.checkpoints import model as model_lib
from vpe_jax.checkpoints.frozen import FrozenNetworks
from vpe_jax.checkpoints.model import Model
from vpe_jax.checkpoints.weights import fingerprint
from vpe_jax.config import CLASSES, Config, SampleConfig, build_section, did_you_mean
from vpe_jax.contracts import Edits, Params, Samples, Stage, System, UserError, require, supports
from vpe_jax.evaluation.report import (
  FROM_DRAFTS,
  GENERATED,
  GROUND_TRUTH,
  RECONSTRUCTED,
  Report,
)
from vpe_jax.generator import Generator

Lowered = jax.stages.Lowered

# Name -> `module:Class`. Packages of systems add their own evaluators (vpe_jax.systems.package).
EVALUATORS: Mapping[str, str] = {
  'heldout': 'vpe_jax.evaluation.heldout:HeldOut',
  'sample_grid': 'vpe_jax.evaluation.sample_grid:SampleGrid',
  'retrieval': 'vpe_jax.evaluation.retrieval:Retrieval',
  'edits': 'vpe_jax.evaluation.editing:EditBenchmark',
  'classes': 'vpe_jax.evaluation.classes:ClassBenchmark',
  'ocr': 'vpe_jax.evaluation.ocr:Ocr',
}


@dataclasses.dataclass(eq=False)
class Subject:
  """A model under evaluation, at one point of its training.

  Attributes:
    system: system of the model.
    params: parameters in the layout of checkpoints; EMA parameters where they exist.
    stage_index: index of the training stage of the parameters.
    mesh: device mesh for evaluation.
    settings: sampling settings; None for those of the run.
    seed: sampling seed.
    stage_step: step within the stage.
    load_frozen: returns the frozen networks; None to load those of the config.
    load_generator: returns a generator of the model; None if the model generates no images.
  """

  system: System
  params: Params
  stage_index: int
  mesh: jax.sharding.Mesh
  settings: SampleConfig | None = None
  seed: int = 0
  stage_step: int | jax.Array = 0
  load_frozen: Callable[[], FrozenNetworks] | None = None
  load_generator: Callable[[], Generator] | None = None

  def __post_init__(self) -> None:
    config: Config = self.system.config
    if self.settings is None:
      self.settings = config.sample

  @classmethod
  def load(
    cls,
    source: str,
    weights: str,
    batch_size: int,
    seed: int,
    overrides: Mapping[str, Any],
    step: int | None = None,
    dtype: str | None = None,
  ) -> Subject:
    """Loads a run or a file of weights; see checkpoints.model.load.

    Args:
      source: see checkpoints.model.load.
      weights: see checkpoints.model.load.
      batch_size: batch size of sampling.
      seed: sampling seed.
      overrides: sampling settings that override those of the run; None values are ignored.
      step: see checkpoints.model.load.
      dtype: see checkpoints.model.load.

    Raises:
      UserError: the model can't be loaded, or rejects the settings.
    """
    model = model_lib.load(source, weights, step, dtype)
    strategy = model.system.config.mesh.strategy
    subject = cls(
      model.system,
      model.params,
      model.stage,
      model.mesh,
      seed=seed,
      stage_step=model.stage_step,
      # Loaded at most once, also for other checkpoints of the run.
      load_frozen=functools.cache(lambda: frozen_lib.load(model.system, model.mesh, strategy)),
    )
    if not supports(model.system, Samples):
      if any(value is not None for value in overrides.values()):
        require(model.system, Samples)
      return subject
    generator = Generator.of(model, batch_size)
    settings = generator.settings(**overrides)
    return dataclasses.replace(subject, settings=settings, load_generator=lambda: generator)

  def at(self, model: Model) -> Subject:
    """The subject with another checkpoint of the same run.

    It shares settings, frozen networks and compiled programs.
    """
    subject = dataclasses.replace(
      self, params=model.params, stage_index=model.stage, stage_step=model.stage_step
    )
    if self.load_generator is None:
      return subject
    generator = self.generator.with_params(model.params, **model.metadata)
    return dataclasses.replace(subject, load_generator=lambda: generator)

  @functools.cached_property
  def key(self) -> jax.Array:
    """The random key of the run, replicated on all devices."""
    config: Config = self.system.config
    return jax.device_put(rng.run_key(config.seed), sharding.replicated(self.mesh))

  @property
  def main(self) -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0

  @property
  def stage(self) -> Stage:
    """The training stage of the parameters."""
    return self.system.stages[self.stage_index]

  @functools.cached_property
  def frozen(self) -> FrozenNetworks:
    """All frozen networks of the system."""
    if self.load_frozen is not None:
      return self.load_frozen()
    return frozen_lib.load(self.system, self.mesh, self.system.config.mesh.strategy)

  @functools.cached_property
  def generator(self) -> Generator:
    """A generator of the model.

    Raises:
      UserError: the model does not generate images.
    """
    require(self.system, Samples)
    return self.load_generator()

  @property
  def image_size(self) -> int:
    """Side R of the images."""
    return self.system.config.data.image_size

  @property
  def task(self) -> str:
    """Kind of prompts; see `task_of`."""
    return task_of(self.system)

  @property
  def notes(self) -> tuple[str, ...]:
    """A warning if the model was not trained on the embedded data sets of the benchmarks."""
    data = self.system.config.data
    if self.task == 'classes' or not data.is_user_data:
      return ()
    return (
      f'trained on {data.source}; the benchmarks use held-out splits of the embedded data sets, '
      'which differ from that data',
    )

  @property
  def description(self) -> Mapping[str, str]:
    """Provenance of the images: checkpoint, settings, version; the checkpoint alone without any."""
    if self.load_generator is None:
      return {'checkpoint': fingerprint(self.params)}
    return self.generator.describe(self.settings)

  def sample(self, prompts: Sequence[str]) -> np.ndarray:
    """One image for each prompt, [N, R, R, 3] uint8; repeated prompts give different images."""
    return stacked(self.generator(list(prompts), 1, self.seed, self.settings))

  def sample_from_drafts(self, prompts: Sequence[str], images: np.ndarray) -> np.ndarray:
    """Images rendered from drafts of `images`, both [N, R, R, 3] uint8; see Samples.drafts."""
    drafts = self.generator.read_drafts(list(images))
    return stacked(self.generator(list(prompts), 1, self.seed, self.settings, fixed=drafts))

  def sampling_programs(self) -> list[Lowered]:
    """The programs of `sample` and `sample_from_drafts`; see Evaluator.programs."""
    return self.generator.programs(self.settings)

  def reconstruct(self, images: np.ndarray) -> np.ndarray:
    """Images [N, R, R, 3] uint8, encoded and decoded by the codec of the model alone."""
    return self.generator.reconstruct(list(images), self.seed)

  def editing(self, source: np.ndarray) -> Subject:
    """The model with fixed source images [N, R, R, 3] uint8; prompts are edit instructions."""
    generator = self.generator.editing(source)
    return dataclasses.replace(
      self, load_frozen=lambda: self.frozen, load_generator=lambda: generator
    )


class Evaluator(Protocol):
  """One evaluation; its dataclass fields are its options.

  Attributes:
    requires: capabilities that the system must have.
    tasks: kinds of prompts that the evaluator supports (Subject.task); empty for all.
    folder: subfolder of the run for sheets from the training loop.
  """

  requires: ClassVar[tuple[type, ...]]
  tasks: ClassVar[tuple[str, ...]]
  folder: ClassVar[str]

  def check(self) -> None:
    """Checks the options before anything is loaded.

    Raises:
      UserError: an option is out of range, or a package is missing.
    """
    ...

  def programs(self, subject: Subject) -> list[Lowered]:
    """The large programs that `run` calls, lowered for a subject, to be compiled ahead of it.

    They are lowered from the jitted functions that `run` calls, so it compiles none of them again.
    """
    ...

  def run(self, subject: Subject) -> Report:
    """Evaluates a model."""
    ...


def names() -> dict[str, str]:
  """Name of each evaluator -> `module:Class`."""
  added = (package.evaluators for package in systems.packages().values())
  return {**EVALUATORS, **{name: path for one in added for name, path in one.items()}}


def class_of(name: str) -> type[Evaluator]:
  """The class of an evaluator.

  Raises:
    UserError: no evaluator has this name.
  """
  known = names()
  if name not in known:
    raise UserError(f"unknown evaluator '{name}'{did_you_mean(name, known)}")
  module, _, cls = known[name].partition(':')
  return getattr(importlib.import_module(module), cls)


def parse_options(settings: Sequence[str], known: Collection[str]) -> dict[str, dict[str, Any]]:
  """Parses command-line options `NAME.OPTION=VALUE`: evaluator name -> option -> value.

  Args:
    settings: the options; values are YAML.
    known: names of the evaluators that run.

  Raises:
    UserError: a setting is malformed, or its evaluator doesn't run.
  """
  options: dict[str, dict[str, Any]] = {}
  for setting in settings:
    key, equals, text = setting.partition('=')
    name, dot, option = key.partition('.')
    if not (equals and dot):
      raise UserError(f'--set={setting}: write NAME.OPTION=VALUE, such as retrieval.captions=64')
    if name not in known:
      raise UserError(f'--set={setting}: --benchmarks does not name {name}')
    try:
      options.setdefault(name, {})[option] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist.
      raise UserError(f'--set={setting}: the value is not YAML, such as 64 or [a, b]') from error
  return options


def build(name: str, options: Mapping[str, Any]) -> Evaluator:
  """Builds an evaluator and checks its options.

  Raises:
    UserError: the evaluator or an option does not exist, or a value is out of range.
  """
  try:
    evaluator = build_section(class_of(name), options)
  except UserError as error:
    raise UserError(f'evaluator {name}: {error}') from error
  evaluator.check()
  return evaluator


def task_of(system: System) -> str:
  """Kind of prompts: `edits`, `classes`, `words` (captions of rendered text) or `captions`."""
  data = system.config.data
  if supports(system, Edits):
    return 'edits'
  if data.tokenizer.startswith(CLASSES):
    return 'classes'
  return 'words' if data.source == 'words' else 'captions'


def check_fits(name: str, evaluator: Evaluator, system: System) -> None:
  """Rejects an evaluator that does not fit a system.

  Raises:
    UserError: the system lacks a capability, or has another kind of prompts.
  """
  for capability in evaluator.requires:
    require(system, capability)
  if evaluator.tasks and task_of(system) not in evaluator.tasks:
    raise UserError(
      f'the evaluator {name} is for {" or ".join(evaluator.tasks)}, and this model takes '
      f'{task_of(system)}'
    )


def rows_of(subject: Subject, prompts: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
  """Row label -> images [N, R, R, 3] uint8 of N prompts, whose ground truth is `images`.

  The rows are the ground truth, the ground truth through the codec, and generated images. A system
  with drafts also has a row of images from ground-truth drafts.
  """
  rows = {
    GROUND_TRUTH: images,
    RECONSTRUCTED: subject.reconstruct(images),
    GENERATED: subject.sample(prompts),
  }
  if subject.generator.system.drafts:
    rows[FROM_DRAFTS] = subject.sample_from_drafts(prompts, images)
  return rows


def fits_stage(evaluator: Evaluator, stage: Stage) -> bool:
  """Whether an evaluator can run in a stage; those that sample images need `Stage.samples`."""
  needed = {base for capability in evaluator.requires for base in capability.__mro__}
  return stage.samples or Samples not in needed


def stacked(images: Sequence[Any]) -> np.ndarray:
  """The pixels [N, R, R, 3] of generated images."""
  return np.stack([image.image for image in images])
