"""The configuration of a run: typed, frozen sections, built from what a config file returns.

`configs/<task>.py` returns nested dicts (an `ml_collections.ConfigDict`); `from_dict` converts them
to the dataclasses below. An unknown key is an error that names the nearest known one.
Each system in vpe_jax/systems defines the type of its `model` section.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from vpe_jax.contracts import UserError

DTYPES = ('float32', 'bfloat16')
REMATS = ('none', 'full', 'attention', 'dots')  # keys of models.mot.REMAT, not importable here
ATTENTIONS = ('reference', 'chunked', 'pallas_tpu', 'pallas_gpu', 'cudnn')  # of ops.attention
OPTIMIZERS = ('adamw', 'adafactor', 'muon')  # keys of training.optimizer.OPTIMIZERS
SCHEDULES = ('constant', 'cosine', 'linear', 'rsqrt')  # keys of training.optimizer.SCHEDULES
START_WEIGHTS = ('raw', 'ema', 'state')  # see Config.start_weights

# Built-in sources: name -> `module:function`, an Opener (vpe_jax.data.sources).
SOURCES: Mapping[str, str] = {
  'mixture': 'vpe_jax.data.sources:open_mixture',
  'openmoji': 'vpe_jax.data.embedded.openmoji:open_openmoji',
  'scenes': 'vpe_jax.data.embedded.scenes:open_scenes',
  'words': 'vpe_jax.data.embedded.words:open_words',
  'edits': 'vpe_jax.data.sources:open_edits',
  'synthetic': 'vpe_jax.data.embedded.synthetic:open_synthetic',
}
# Prefixes of other sources, before a path, a recipe, and a name.
FOLDER, FOLDERS, TFDS = 'folder:', 'folders:', 'tfds:'
CLASSES = 'classes:'  # prefix of class names: the tokenizer of a class-conditional model
PROMPT_FIELDS = ('caption', 'group')
FITS, ENCODES = ('pad', 'crop'), ('online', 'cached')
# Annotations of the fields that `check_sizes` checks.
_SIZE_TYPES = (int, tuple[int, ...], 'int', 'tuple[int, ...]', 'int | tuple[int, ...]')
_GROUP = re.compile(r'(?:^|,)\s*([A-Za-z_]\w*)\s*=\s*')  # a parameter group in Config.start
_MAX_LAYERS = 1000
_MAX_SIZE = 10**8  # a larger size is a typing error, and its program would take hours to build


class _OutOfRange(UserError):
  """A field's value is out of range. Sections that don't know their path leave it to `_build`."""

  def __init__(self, name: str, message: str, path: str):
    super().__init__(f"config key '{path}{name}' {message}")
    self.name, self.message = name, message


# Defined first because defaults below call it.
def check(section: Any, path: str, name: str, valid: bool, requirement: str) -> None:
  """Raises a UserError for a field of a section unless its value is `valid`.

  Args:
    section: a dataclass, during its `__post_init__`.
    path: of the section, such as `optim.`; '' if it may occur at several (`_build` adds the path).
    name: of the field.
    valid: whether its value is in range.
    requirement: completes "it must be ..." in the error.
  """
  if not valid:
    raise _OutOfRange(name, f'is {getattr(section, name)!r}: it must be {requirement}', path)


def check_sizes(section: Any, path: str = '', **minimum: int) -> None:
  """Applies `check` to all sizes of a section: fields that hold whole numbers or tuples of them.

  `minimum` has lower bounds by field name; the bound of other fields is 1, or their default if that
  is lower.
  """
  for field in dataclasses.fields(section):
    if field.type not in _SIZE_TYPES:
      continue
    default = field.default if isinstance(field.default, int) else 1
    low, value = minimum.get(field.name, min(1, default)), getattr(section, field.name)
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    check(section, path, field.name, whole, 'a whole number')
    check(section, path, field.name, min(sizes, default=low) >= low, f'at least {low}')
    # Some networks are traced layer by layer, so many layers take long to trace.
    high = _MAX_LAYERS if field.name == 'layers' else _MAX_SIZE
    check(section, path, field.name, max(sizes, default=0) <= high, f'at most {high}')


class Tagged:
  """Annotation of a config field whose section is of one of several kinds.

  The section's field `kind` names the kind; its other fields are those of that kind's dataclass.

  Attributes:
    KINDS: kind -> its frozen dataclass, which has a field `kind`.
  """

  KINDS: ClassVar[Mapping[str, type]]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The training data.

  Attributes:
    source: `mixture` (OpenMoji and scenes), `openmoji`, `scenes`, `words` (rendered words),
      `edits` (of scenes and of OpenMoji), `synthetic`; or the user's own data: `folder:PATH`, a
      folder of image files or one written by `python -m vpe_jax.prepare`; `folders:NAME*3,NAME`,
      several folders with repeat factors (vpe_jax.data.recipes); `tfds:NAME/SPLIT`, ArrayRecord
      files of TensorFlow Datasets (vpe_jax.data.formats.tfds).
    root: parent folder of the folders of `folders:` and of the data sets of `tfds:`.
    scenes_share: share of scenes in `mixture` and in `edits`.
    examples: number of records (0: all of a finite source).
    image_size: side of the square image in pixels.
    fit: how a rectangular image becomes a square: `pad` with white, or `crop` its centre.
    text_length: number of token slots for a caption; longer captions are cut, with a warning.
    encode: `online` (frozen encoders run during training) or `cached` (their outputs are computed
      once, before training).
    workers: reader processes per host (0: threads in this process).
    tokenizer: `assets:bpe` (for the embedded data); a published one as `FAMILY:NAME`, where NAME is
      a folder or a hub id, and the family gives its special tokens (a key of FAMILIES in
      vpe_jax/data/tokenizers/special_tokens.py); or, for a class-conditional model, `classes:` and
      the class names (`cat,dog`), their number, or a text file with one name per line.
    prompt_field: field of a record that is its prompt: `caption`, or `group` (its class; in a
      folder of images, the name of the subfolder).
    near_misses: number of hard negatives per example of a scene: captions that are wrong in one
      detail.
    language: language of a folder's records, such as `en`; others are skipped (empty: none).
    least_text_height: minimum height of text in a folder's images, in pixels of the padded image;
      records with smaller text are skipped (0: none). See vpe_jax.data.filters.
    source_images: whether each record has a source image beside its own image, and its caption is
      the editing instruction: the training data of systems that edit.
  """

  source: str = 'mixture'
  root: str = 'data'
  scenes_share: float = 0.75
  examples: int = 0
  image_size: int = 64
  fit: str = 'pad'
  text_length: int = 32
  encode: str = 'online'
  workers: int = 0
  tokenizer: str = 'assets:bpe'
  near_misses: int = 0
  prompt_field: str = 'caption'
  language: str = ''
  least_text_height: int = 0
  source_images: bool = False

  def __post_init__(self) -> None:
    check_sizes(self, 'data.')
    check(self, 'data.', 'scenes_share', 0 <= self.scenes_share <= 1, 'between 0 and 1')
    for name, known in {'encode': ENCODES, 'prompt_field': PROMPT_FIELDS, 'fit': FITS}.items():
      check(self, 'data.', name, getattr(self, name) in known, f'one of {", ".join(known)}')
    self._check_source()
    # Family and folder or hub id are checked when the tokenizer is opened.
    known = f'assets:bpe, FAMILY:FOLDER, FAMILY:OWNER/NAME (a hub id), or {CLASSES}NAMES'
    valid = re.match(r'(?!assets:)[\w.-]+:.', self.tokenizer) or self.tokenizer == 'assets:bpe'
    check(self, 'data.', 'tokenizer', bool(valid), known)

  def _check_source(self) -> None:
    if self.source not in SOURCES and not self.is_stored:
      stored = (f'{FOLDER}PATH', f'{FOLDERS}NAME*3,NAME', f'{TFDS}NAME/SPLIT')
      hint = nearest(self.source, (*SOURCES, *stored))
      raise UserError(f"unknown config.data.source '{self.source}'{hint}")
    check(self, 'data.', 'source', self.source != FOLDER, f'{FOLDER} and the path of a folder')
    check(self, 'data.', 'source', self.source != TFDS, f'{TFDS} and the name of a data set')
    if self.source.startswith(FOLDERS):
      entries = self.source.removeprefix(FOLDERS).split(',')
      names = {entry.partition('*')[0].strip() for entry in entries}
      valid = all(re.fullmatch(r'[^*]*[^*\s][^*]*(\*[1-9]\d*)?', entry) for entry in entries)
      example = f'{FOLDERS} and different names, as in {FOLDERS}one*3,other'
      check(self, 'data.', 'source', valid and len(names) == len(entries), example)

  @property
  def in_folders(self) -> bool:
    """Whether the records are the user's own, in one or several folders."""
    return self.source.startswith((FOLDER, FOLDERS))

  @property
  def is_stored(self) -> bool:
    """Whether the records are the user's own, in any format."""
    return self.in_folders or self.source.startswith(TFDS)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer and its learning rate. Each field has one value, or one per stage.

  Attributes:
    name: `adamw`; `adafactor` (factored second moments, no first moment: `b1`, `b2`, `eps` and
      `mu_dtype` are not used, and the learning rate is relative to the scale of each parameter);
      `muon` (for the matrices inside the network; AdamW for all other parameters).
    lr: peak learning rate.
    schedule: after warm-up: `constant`; `cosine` or `linear`, down to `lr_end`; or `rsqrt`,
      proportional to 1 / sqrt(step), never below `lr_end`.
    warmup: steps of linear warm-up; the last one has the rate `lr`.
    lr_end: learning rate at the end of a decay.
    decay_steps: length of `cosine` and `linear`, warm-up included (0: all steps of the stage).
    multipliers: learning-rate factors above 0 by parameter path, `PATTERN=FACTOR,PATTERN=FACTOR`.
      Patterns are regular expressions that match from the start of a path, as in Stage.trainable.
      The first match counts; other parameters have factor 1.
    b1: decay of AdamW's first moment (also for the parameters that Muon leaves to AdamW).
    b2: decay of AdamW's second moment (likewise).
    eps: epsilon in AdamW's denominator and in Muon's norms.
    momentum: decay of Muon's momentum.
    mu_dtype: dtype in which first moments and momentum are stored, `float32` or `bfloat16`.
    weight_decay: decoupled weight decay, multiplied by the learning rate; not applied to biases and
      scales.
    clip: maximum of the global gradient norm (0: off).
    accumulate: number of microbatches per step.
    ema: decay of the exponential moving average of the parameters (0: no average).
  """

  name: str | tuple[str, ...] = 'adamw'
  lr: float | tuple[float, ...] = 1e-3
  schedule: str | tuple[str, ...] = 'constant'
  warmup: int | tuple[int, ...] = 50
  lr_end: float | tuple[float, ...] = 0.0
  decay_steps: int | tuple[int, ...] = 0
  multipliers: str | tuple[str, ...] = ''
  b1: float | tuple[float, ...] = 0.9
  b2: float | tuple[float, ...] = 0.999
  eps: float | tuple[float, ...] = 1e-8
  momentum: float | tuple[float, ...] = 0.95
  mu_dtype: str | tuple[str, ...] = 'float32'
  weight_decay: float | tuple[float, ...] = 0.0
  clip: float | tuple[float, ...] = 1.0
  accumulate: int | tuple[int, ...] = 1
  ema: float | tuple[float, ...] = 0.9995

  def __post_init__(self) -> None:
    check_sizes(self, 'optim.', warmup=0, decay_steps=0)
    values = lambda name: v if isinstance(v := getattr(self, name), tuple) else (v,)
    choices = {'name': OPTIMIZERS, 'schedule': SCHEDULES, 'mu_dtype': DTYPES}
    for name, known in choices.items():
      valid = all(value in known for value in values(name))
      check(self, 'optim.', name, valid, f'one of {", ".join(known)}')
    valid = all(0 < value < math.inf for value in values('lr'))
    check(self, 'optim.', 'lr', valid, 'above 0 and finite')
    for name in ('b1', 'b2', 'momentum', 'ema'):
      valid = all(0 <= value < 1 for value in values(name))
      check(self, 'optim.', name, valid, 'at least 0 and below 1')
    for name in ('lr_end', 'eps', 'weight_decay', 'clip'):
      valid = all(0 <= value < math.inf for value in values(name))
      check(self, 'optim.', name, valid, 'at least 0 and finite')
    valid = all(_factors(text) is not None for text in values('multipliers'))
    example = 'PATTERN=FACTOR,... with regular expressions and factors above 0, as encoder/=0.5'
    check(self, 'optim.', 'multipliers', valid, example)

  @property
  def factors(self) -> tuple[tuple[str, float], ...]:
    """The pairs (regular expression, factor) of `multipliers`; for the settings of one stage."""
    return _factors(self.multipliers)

  def of(self, stage: int, steps: int = 0) -> OptimConfig:
    """The settings of one stage: every field has a single value.

    Args:
      stage: index of the stage.
      steps: of the stage; replaces a `decay_steps` of 0.
    """
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    select = lambda value: value[stage] if isinstance(value, tuple) else value
    settings = {name: select(value) for name, value in values.items()}
    settings['decay_steps'] = settings['decay_steps'] or steps
    return OptimConfig(**settings)

  def check_stages(self, count: int) -> None:
    """Raises a UserError unless every field has one value, or one per stage."""
    for field in dataclasses.fields(self):
      valid = not isinstance(value := getattr(self, field.name), tuple) or len(value) == count
      check(self, 'optim.', field.name, valid, f'one value, or one per stage ({count})')


def _factors(text: str) -> tuple[tuple[str, float], ...] | None:
  """Parses `optim.multipliers`; None if the text is malformed."""
  entries = [entry.rpartition('=') for entry in text.split(',') if entry.strip()]
  try:
    pairs = tuple((re.compile(entry[0].strip()).pattern, float(entry[2])) for entry in entries)
  except (re.error, ValueError):
    return None
  return pairs if all(pattern and 0 < factor < math.inf for pattern, factor in pairs) else None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The device mesh: axis sizes (at most one is -1: all remaining devices) and strategy."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  strategy: str = 'fsdp'


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Steps between checkpoints; keeps the newest `keep`, and multiples of `keep_every` (0: none)."""

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
    profile: range of steps, such as `10:13`, that is profiled into RUN/profile (empty: none).
  """

  every: int = 20
  profile: str = ''

  def __post_init__(self) -> None:
    check_sizes(self, 'log.')


def default_evals() -> dict[str, dict[str, int]]:
  """Evaluators that run in the training loop unless a config says otherwise."""
  return {'heldout': {'every': 250}, 'sample_grid': {'every': 500}}


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of one run.

  `steps` and `batch_size` have one entry per stage, or one for all stages; fields of `optim` may.

  Attributes:
    name: name of the config file, without folder and suffix.
    preset: size of the run (`debug`, `tiny`, `paper`, ...).
    system: a key of vpe_jax.systems.known().
    stages: names of the stages to run, in order.
    steps: optimizer steps of each stage.
    batch_size: global batch size of each stage.
    seed: seed of data order, initialization and noise.
    start: workdir of a parent run, whose newest intact checkpoint initializes all parameters
      (empty: none); optimizer, moving average and data order start anew. Parameter groups may come
      from several runs: `RUN,dit=RUN2` takes parameters whose path begins with `dit/` from RUN2 and
      all others from RUN; `dit=RUN2` alone leaves the others initialized as without `start`.
    start_weights: which weights of the parent run: `raw`; `ema` (its moving average, where its
      stage has one); or `state`, which also restores optimizer, moving average and position in the
      data, as if the parent run continued, with steps counted from 0.
    dtype: compute dtype, `float32` or `bfloat16`; parameters are always float32.
    remat: what the backward pass recomputes: `none`; `full`: everything in a layer; `attention`:
      everything except attention, whose output and log-sum-exp are saved; `dots`: everything except
      attention and dense matrix products.
    attention: implementation of attention, which runs or raises: `reference` (dense), `chunked`
      (any platform, memory linear in the sequence), `pallas_tpu`, `pallas_gpu`, `cudnn`; empty, and
      always for fewer than 16 queries (decoding): chosen by platform and shape.
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
      UserError: `start` names two runs for the same parameters, or none after a group's `=`.
    """
    entries = self.start.split(',') if _GROUP.search(self.start) else [self.start]
    workdirs: dict[str, str] = {}
    for entry in filter(None, map(str.strip, entries)):
      match = _GROUP.match(entry)
      prefix = f'{match[1]}/' if match else ''
      if prefix in workdirs:
        raise UserError(f"config.start is '{self.start}': two runs for the same parameters")
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
  config = _build(Config, {'sample': {}, **values}, '', section_types)
  choices = {'dtype': DTYPES, 'remat': REMATS, 'start_weights': START_WEIGHTS}
  for name, known in (choices | {'attention': ('', *ATTENTIONS)}).items():
    if (value := getattr(config, name)) not in known:
      raise UserError(f"config.{name} is '{value}'; known: {', '.join(filter(None, known))}")
  if not (count := len(config.stages)):
    raise UserError('config.stages is empty: name the stages to run')
  by_stage = {}
  for name in ('steps', 'batch_size'):
    sizes = getattr(config, name)
    if len(sizes) == 1:
      sizes = sizes * count
    if len(sizes) != count:
      raise UserError(f'config.{name} has {len(sizes)} entries for {count} stages {config.stages}')
    if min(sizes, default=1) < 1:
      raise UserError(f'config.{name} is {sizes}: every stage needs at least 1')
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


def build_section(cls: type, values: Mapping[str, Any]) -> Any:
  """Builds a section (a frozen dataclass) from nested dicts, the inverse of `to_dict`.

  Raises:
    UserError: a key is unknown or missing, or its value has the wrong type or is out of range.
  """
  return _build(cls, dict(values), '', {})


def base_section(section: Any, cls: type) -> Any:
  """The fields of a section that its base class `cls` has, as an instance of `cls`."""
  return cls(**{field.name: getattr(section, field.name) for field in dataclasses.fields(cls)})


def to_dict(config: Any) -> dict[str, Any]:
  """The config as plain nested dicts and lists, which checkpoints store as JSON."""
  if dataclasses.is_dataclass(config):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, Mapping):
    return {name: to_dict(value) for name, value in config.items()}
  return [to_dict(item) for item in config] if isinstance(config, tuple) else config


def flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts as one dict with dotted keys, such as `optim.lr`."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def differences(ours: Config, stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Fields in which a config differs from a stored one: dotted name -> (stored value, our value).

  A field that did not exist when the other config was stored counts as its default.
  """
  # A stored field that no longer exists is a difference.
  with contextlib.suppress(UserError):
    stored = to_dict(from_dict(stored, type(ours.model), type(ours.sample)))
  old, new = flatten(stored), flatten(to_dict(ours))
  names = sorted(old.keys() | new.keys())
  return {n: (old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n)}


def nearest(word: str, known: typing.Iterable[str]) -> str:
  """End of an error message: `; did you mean 'x'?` for a close match, else all known words."""
  known = sorted(known)
  if not known:
    return '; there are none here'
  close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
  return f"; did you mean '{close[0]}'?" if close else f'; known: {", ".join(known)}'


def _build(cls: type, values: Mapping[str, Any], path: str, sections: Mapping[str, type]) -> Any:
  hints = typing.get_type_hints(cls) | dict(sections)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise UserError(f"unknown config key '{path}{key}'{nearest(key, fields)}")
  built = {}
  for name, field in fields.items():
    if name in values:
      value = values[name]
      if dataclasses.is_dataclass(field.default) and isinstance(value, Mapping):
        value = _merged(to_dict(field.default), value)
      built[name] = _value(hints[name], value, f'{path}{name}')
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise UserError(f"config key '{path}{name}' is missing")
  try:
    return cls(**built)
  except _OutOfRange as error:
    raise _OutOfRange(error.name, error.message, path) from error


def _merged(default: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a section, with missing ones from its default."""
  if values.get('kind', default.get('kind')) != default.get('kind'):
    return dict(values)  # The default is of another kind and has other fields.
  merged = dict(default)
  for name, value in values.items():
    inner = isinstance(value, Mapping) and isinstance(default.get(name), Mapping)
    merged[name] = _merged(default[name], value) if inner else value
  return merged


def _value(hint: Any, value: Any, path: str) -> Any:
  tagged = isinstance(hint, type) and issubclass(hint, Tagged)
  origin, is_section = typing.get_origin(hint), tagged or dataclasses.is_dataclass(hint)
  if (is_section or origin is Mapping) and not isinstance(value, Mapping):
    raise UserError(f"config key '{path}' must be a section, not {value!r}")
  if is_section:
    if tagged:
      if (kind := value.get('kind')) not in hint.KINDS:
        raise UserError(f"config key '{path}.kind' is {kind!r}{nearest(str(kind), hint.KINDS)}")
      hint = hint.KINDS[kind]
    return _build(hint, dict(value), f'{path}.', {})
  if origin in (typing.Union, types.UnionType):
    if value is None:
      return None
    hints = [inner for inner in typing.get_args(hint) if inner is not type(None)]
    tuples = [inner for inner in hints if typing.get_origin(inner) is tuple]
    choices = tuples if isinstance(value, (tuple, list)) and tuples else hints
    return _value(choices[0], value, path)
  if origin is Mapping:
    return to_dict(value)
  if origin is tuple:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(_value(typing.get_args(hint)[0], item, path) for item in items)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise UserError(f"config key '{path}' must be {hint.__name__}, not {value!r}")
  return value
