"""The configuration of a run, and its smaller sections."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vpe_jax.config.data import DataConfig
from vpe_jax.config.fields import MAX_SIZE, check, check_sizes
from vpe_jax.config.nested import build_section, flatten, to_dict
from vpe_jax.config.optim import OptimConfig
from vpe_jax.contracts import DTYPES, UserError

REMATS = ('none', 'full', 'attention', 'dots')  # keys of models.mot.REMAT, not importable here
ATTENTIONS = ('reference', 'chunked', 'pallas_tpu', 'pallas_gpu', 'cudnn')  # of ops.attention
START_WEIGHTS = ('raw', 'ema', 'state')  # see Config.start_weights
_GROUP = re.compile(r'(?:^|,)\s*([A-Za-z_]\w*)\s*=\s*')  # a parameter group in Config.start
_WORD = re.compile(r'(?!\.{1,2}$)[\w.-]+')  # a folder's name


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Axis sizes of the device mesh (one may be -1: all remaining devices), and sharding strategy."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  strategy: str = 'fsdp'

  def __post_init__(self) -> None:
    for name in ('data', 'fsdp', 'tensor'):
      size = getattr(self, name)
      check(self, 'mesh.', name, size == -1 or 1 <= size <= MAX_SIZE, '-1 or at least 1')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Saves every `every` steps; keeps the newest `keep`, and multiples of `keep_every` (0: none)."""

  every: int = 200
  keep: int = 2
  keep_every: int = 0

  def __post_init__(self) -> None:
    check_sizes(self, 'checkpoint.')


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """Base class of sampling settings: the type of a config's `sample` section.

  A system that samples composes its settings from the groups in vpe_jax.sampling.settings. Other
  systems use this class, which has no fields.
  """

  def __post_init__(self) -> None:
    check_sizes(self, 'sample.')


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Console output and profiling.

  Attributes:
    every: steps between two lines of output.
    profile: range of steps, such as `10:13` for steps 10, 11 and 12, that is profiled into
      RUN/profile (empty: none).
  """

  every: int = 20
  profile: str = ''

  def __post_init__(self) -> None:
    check_sizes(self, 'log.')
    valid = not self.profile or self.profiled_steps
    check(self, 'log.', 'profile', bool(valid), 'a range of steps from 1 on, such as 10:13')

  @property
  def profiled_steps(self) -> range:
    """The range `profile`; empty without one."""
    match = re.fullmatch(r'([1-9]\d{0,8}):([1-9]\d{0,8})', self.profile)
    return range(int(match[1]), int(match[2])) if match else range(0)


def default_evals() -> dict[str, dict[str, int]]:
  """Evaluators that run in the training loop unless a config says otherwise."""
  return {'heldout': {'every': 250}, 'sample_grid': {'every': 500}}


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of one run.

  `steps` and `batch_size` have one entry per stage, or one for all; so may fields of `optim`.

  Attributes:
    name: name of the config file, without folder and suffix.
    preset: size of the run (`debug`, `tiny`, `paper`, ...).
    system: a key of vpe_jax.systems.known().
    stages: names of the stages to run, in order.
    steps: optimizer steps of each stage.
    batch_size: global batch size of each stage.
    seed: seed of data order, initialization and noise.
    start: workdir of a parent run, whose newest intact checkpoint initializes all parameters, or a
      file of weights: `assets:tiny`, or one that vpe_jax.export wrote (empty: none). Optimizer,
      moving average and data order start anew. Parameter groups may come from several runs:
      `RUN,dit=RUN2` takes parameters whose path begins with `dit/` from RUN2 and all others from
      RUN; `dit=RUN2` alone initializes the others as if `start` were empty.
    start_weights: which weights of the parent run (a file has only one kind): `raw`; `ema` (its
      moving average, where its stage has one); or `state`, which also restores optimizer, moving
      average and position in the data, as if the parent run continued, with steps counted from 0.
    dtype: compute dtype, `float32` or `bfloat16`; parameters are always float32.
    remat: what the backward pass recomputes: `none`; `full`: everything in a layer; `attention`:
      everything except attention, whose output and log-sum-exp are saved; `dots`: everything except
      attention and dense matrix products.
    attention: implementation of attention: `reference` (dense), `chunked` (any platform, memory
      linear in the sequence), `pallas_tpu`, `pallas_gpu` or `cudnn`; it raises an error where it
      can't run. If empty, platform and shape decide. Decoding (fewer than 16 queries) ignores this
      and uses `reference`.
    unroll: whether training runs layers without a scan: faster on CPU, slower to compile.
    quick_compile: whether to turn off most XLA optimizations, for runs of seconds.
    model: the system's own section.
    sample: the system's sampling settings.
    evals: evaluators that run in the training loop, by name (vpe_jax.evaluation.evaluator). Each
      has `every`, the steps between two runs (0: never), and its own options. They also run at the
      end of each stage.
  """

  name: str
  preset: str
  system: str
  stages: tuple[str, ...]
  steps: tuple[int, ...]
  batch_size: tuple[int, ...]
  model: Any
  seed: int = 0
  start: str = ''
  start_weights: str = 'raw'
  dtype: str = 'float32'
  remat: str = 'none'
  attention: str = ''
  unroll: bool = False
  quick_compile: bool = False
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  sample: SampleConfig = SampleConfig()
  log: LogConfig = LogConfig()
  evals: Mapping[str, Any] = dataclasses.field(default_factory=default_evals)

  @property
  def parents(self) -> dict[str, str]:
    """Parent runs in `start`: prefix of parameter paths ('' for all others) -> workdir.

    Raises:
      UserError: `start` names two runs for the same parameters, or a group without a run.
    """
    entries = self.start.split(',') if _GROUP.search(self.start) else [self.start]
    workdirs: dict[str, str] = {}
    for entry in filter(None, map(str.strip, entries)):
      match = _GROUP.match(entry)
      prefix = f'{match[1]}/' if match else ''
      if prefix in workdirs:
        raise UserError(
          f"config.start is '{self.start}': two runs for the same parameters; name one"
        )
      workdirs[prefix] = entry[match.end() :] if match else entry
      if not workdirs[prefix]:
        raise UserError(f"config.start is '{self.start}': name a run after {entry}")
    return workdirs

  def optim_of(self, stage: int) -> OptimConfig:
    """The optimizer settings of one stage; `decay_steps` of 0 becomes all steps of the stage."""
    return self.optim.of(stage, self.steps[stage])

  def has_parent(self, *prefixes: str) -> bool:
    """Whether `start` names a parent run for every one of these prefixes of parameter paths."""
    return bool(self.start) and ('' in self.parents or set(prefixes) <= self.parents.keys())


def from_dict(
  values: Mapping[str, Any], model: type, sample: type[SampleConfig] = SampleConfig
) -> Config:
  """Builds a Config from nested dicts; `model` and `sample` are the types of these sections.

  Raises:
    UserError: a key is unknown or missing, or its value has the wrong type or is out of range.
  """
  section_types = {'model': model, 'sample': sample}
  config = build_section(Config, {'sample': {}, **values}, section_types)
  choices = {'dtype': DTYPES, 'remat': REMATS, 'start_weights': START_WEIGHTS}
  for name, known in (choices | {'attention': ('', *ATTENTIONS)}).items():
    if (value := getattr(config, name)) not in known:
      raise UserError(f"config.{name} is '{value}'; known: {', '.join(filter(None, known))}")
  for name in ('name', 'preset'):
    if not _WORD.fullmatch(value := getattr(config, name)):
      raise UserError(
        f"config.{name} is '{value}': it names the run's folder, so it must be a word of letters, "
        'digits, -, _ and .'
      )
  if not (count := len(config.stages)):
    raise UserError('config.stages is empty: name the stages to run')
  by_stage = {}
  for name in ('steps', 'batch_size'):
    sizes = getattr(config, name)
    if len(sizes) == 1:
      sizes = sizes * count
    if len(sizes) != count:
      raise UserError(f'config.{name} has {len(sizes)} entries for {count} stages {config.stages}')
    if min(sizes) < 1:
      raise UserError(f'config.{name} is {sizes}: every stage needs at least 1')
    if max(sizes) > MAX_SIZE:
      raise UserError(f'config.{name} is {sizes}: at most {MAX_SIZE:,} in a stage')
    by_stage[name] = sizes
  config.optim.check_stages(count)
  _check_evals(config.evals)
  if config.start_weights == 'state' and set(config.parents) != {''}:
    raise UserError(
      'config.start_weights is state, which restores the optimizer of a single parent run, but '
      f"config.start is '{config.start}': name one run"
    )
  return dataclasses.replace(config, **by_stage)


def _check_evals(evals: Mapping[str, Any]) -> None:
  for name, options in evals.items():
    every = options.get('every') if isinstance(options, Mapping) else None
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
      raise UserError(
        f'config.evals.{name} is {options!r}: it must be a section with `every`, the steps between '
        'two runs (0: never), and the options of the evaluator'
      )


def differences(ours: Config, stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Fields in which a config differs from a stored one: dotted name -> (stored value, our value).

  A field that did not exist when `stored` was written counts as its default. A stored field that no
  longer exists is a difference.
  """
  known = to_dict(ours)
  old, new = flatten(stored), flatten(known)
  removed = {name: value for name, value in old.items() if name not in new}
  # A stored value that is no longer valid is compared as it was written.
  with contextlib.suppress(UserError):
    rebuilt = from_dict(_common(stored, known), type(ours.model), type(ours.sample))
    old = flatten(to_dict(rebuilt)) | removed
  names = sorted(old.keys() | new.keys())
  return {n: (old.get(n), new.get(n)) for n in names if n in removed or old.get(n) != new.get(n)}


def _common(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
  """The part of nested dicts whose keys are known."""
  both = {name: (value, known[name]) for name, value in values.items() if name in known}
  sections = lambda value, other: isinstance(value, Mapping) and isinstance(other, Mapping)
  return {name: _common(*pair) if sections(*pair) else pair[0] for name, pair in both.items()}
