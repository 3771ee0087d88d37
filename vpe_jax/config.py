"""The configuration of a run: typed, frozen sections, built from what a config file returns.

`configs/<task>.py` returns plain nested dicts (an `ml_collections.ConfigDict`); `from_dict` turns
them into the dataclasses below and refuses a key that no section has, naming the nearest one.
The `model` section belongs to the system: each module in vpe_jax/systems names its own type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
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
STARTS = ('raw', 'ema', 'state')  # what a run takes from another, see Config.start_weights


# Or FOLDER and a path, FOLDERS and a recipe, or TFDS and a name.
SOURCES = ('mixture', 'openmoji', 'scenes', 'words', 'edits', 'synthetic')
FOLDER = 'folder:'
FOLDERS = 'folders:'
TFDS = 'tfds:'
CLASSES = 'classes:'  # and their names: the tokenizer of a class-conditional model
WORDS = ('caption', 'group')
FITS = ('pad', 'crop')
ENCODES = ('online', 'cached')
# The types of sizes.
_SIZES = (int, tuple[int, ...], 'int', 'tuple[int, ...]', 'int | tuple[int, ...]')
_GROUP = re.compile(r'(?:^|,)\s*([A-Za-z_]\w*)\s*=\s*')  # of parameters, in Config.start
_MOST_LAYERS = 1000
_MOST = 10**8  # of any size: what is larger is a slip, and would compute for ages


class _OutOfRange(UserError):
  """A field's value is out of range; a section doesn't know its own place in the config."""

  def __init__(self, name: str, words: str, section: str):
    super().__init__(f"config key '{section}{name}' {words}")
    self.name, self.words = name, words


def check(section: Any, path: str, name: str, good: bool, words: str) -> None:
  """Refuses a section's field unless `good`; stands up here as defaults below already use it.

  Args:
    section: a dataclass, as its `__post_init__` finds it.
    path: of the section, such as `optim.`; where it may stand at several, '': `from_dict` knows.
    name: of the field.
    good: whether its value is in range.
    words: what it must be.
  """
  if not good:
    raise _OutOfRange(name, f'is {getattr(section, name)!r}: it must be {words}', path)


def check_sizes(section: Any, path: str = '', **least: int) -> None:
  """Refuses sizes below their bounds: `least`, else 1, or the field's default if that is lower.

  Sizes are the fields that hold a whole number or a tuple of them; see `check` for the rest.
  """
  for field in dataclasses.fields(section):
    if field.type not in _SIZES:
      continue
    default = field.default if isinstance(field.default, int) else 1
    bound, value = least.get(field.name, min(1, default)), getattr(section, field.name)
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    check(section, path, field.name, whole, 'a whole number')
    check(section, path, field.name, min(sizes, default=bound) >= bound, f'at least {bound}')
    # Some networks are traced layer by layer, which takes its time.
    most = _MOST_LAYERS if field.name == 'layers' else _MOST
    check(section, path, field.name, max(sizes, default=0) <= most, f'at most {most}')


class Tagged:
  """Annotation of a field that holds a section of one of several kinds.

  The section names its kind in its field `kind` and has the fields of that kind's dataclass.

  Attributes:
    KINDS: kind -> its frozen dataclass, which has a field `kind`.
  """

  KINDS: ClassVar[Mapping[str, type]]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The training data.

  Attributes:
    source: `mixture` (OpenMoji and scenes), `openmoji`, `scenes`, `words` (pictures of words),
      `edits` (of scenes and of OpenMoji), `synthetic`; or a user's own: `folder:PATH`, of single
      files or as `python -m vpe_jax.prepare` writes it; `folders:NAME*3,NAME`, several of them,
      each with the times that it counts (vpe_jax.data.recipes); `tfds:NAME/SPLIT`, as TensorFlow
      Datasets writes ArrayRecord (vpe_jax.data.formats.tfds).
    root: where the folders of `folders:` are, and the data sets of `tfds:`.
    scenes_share: share of scenes in the mixture, and in the edits.
    examples: number of records to draw (0: all of a finite source).
    image_size: side of the square image in pixels.
    fit: how a picture of another shape becomes a square: `pad`, whole on white, or `crop`, its
      middle.
    text_length: caption tokens kept for; longer captions are cut, with a warning.
    encode: `online` (frozen encoders run on the device) or `cached` (codes and latents are
      computed once, before training).
    workers: reader processes per host (0: threads in this process).
    tokenizer: `assets:bpe` (of the embedded sets), a folder with a published tokenizer, its hub
      id, or for a class-conditional model `classes:` and the names of the classes (`cat,dog`; a
      number of them; or a text file with a name a line).
    words: what a record's picture is drawn from: its `caption`, or the name of its `group`, which
      for pictures in a folder is that of the folder that they lie in.
    near_misses: captions that are wrong in one detail, for each example of a scene.
    language: of a folder's records that are kept, such as `en` (empty: all); see
      vpe_jax.data.filters for this and the next.
    least_text_height: in pixels of the padded picture, of what is written in a folder's pictures;
      records with lower text are left out (0: none are).
    references: whether each record has a picture before beside its own, and its caption is what to
      do with it: what a system that edits trains on.
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
  words: str = 'caption'
  language: str = ''
  least_text_height: int = 0
  references: bool = False

  def __post_init__(self) -> None:
    check_sizes(self, 'data.')
    share = 0 <= self.scenes_share <= 1
    check(self, 'data.', 'scenes_share', share, 'between 0 and 1')
    listed = ', '.join(ENCODES)
    check(self, 'data.', 'encode', self.encode in ENCODES, f'one of {listed}')
    if self.source not in SOURCES and not self.is_stored:
      own = (f'{FOLDER}PATH', f'{FOLDERS}NAME*3,NAME', f'{TFDS}NAME/SPLIT')
      hint = nearest(self.source, (*SOURCES, *own))
      raise UserError(f"unknown config.data.source '{self.source}'{hint}")
    check(self, 'data.', 'source', self.source != FOLDER, f'{FOLDER} and the path of a folder')
    check(self, 'data.', 'source', self.source != TFDS, f'{TFDS} and the name of a data set')
    if self.source.startswith(FOLDERS):
      entries = self.source.removeprefix(FOLDERS).split(',')
      names = [entry.partition('*')[0].strip() for entry in entries]
      good = all(re.fullmatch(r'[^*]*[^*\s][^*]*(\*[1-9]\d*)?', entry) for entry in entries)
      words = f'{FOLDERS} and different names, as in {FOLDERS}one*3,other'
      check(self, 'data.', 'source', good and len(set(names)) == len(names), words)
    # Whether a folder or a hub's model is there is seen when it is opened.
    shipped, named = self.tokenizer == 'assets:bpe', bool(re.search(r'^[.~]|/', self.tokenizer))
    words = f'assets:bpe, a folder with a tokenizer.json, a hub id (OWNER/NAME), or {CLASSES}NAMES'
    good = shipped or named or os.path.isdir(self.tokenizer) or self.tokenizer.startswith(CLASSES)
    check(self, 'data.', 'tokenizer', good, words)
    for name, known in (('words', WORDS), ('fit', FITS)):
      check(self, 'data.', name, getattr(self, name) in known, f'one of {", ".join(known)}')

  @property
  def in_folders(self) -> bool:
    """Whether the records are a user's own, in one folder or several."""
    return self.source.startswith((FOLDER, FOLDERS))

  @property
  def is_stored(self) -> bool:
    """Whether the records are a user's own, in any form."""
    return self.in_folders or self.source.startswith(TFDS)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer and its learning rate. Each field has one value, or one per stage.

  Attributes:
    name: `adamw`; `adafactor`, whose second moments are factored into rows and columns (no first
      moment: `b1`, `b2`, `eps` and `mu_dtype` are not used, and its rates are relative to the
      size of each parameter); `muon`, for matrices inside the network, with AdamW for the rest.
    lr: the peak learning rate.
    schedule: after warm-up: `constant`; `cosine` or `linear`, down to `lr_end`; or `rsqrt`, in
      proportion to 1 / sqrt(step), never below `lr_end`.
    warmup: steps of linear warm-up; the rate reaches `lr` in the last of them.
    lr_end: rate at the end of a decay.
    decay_steps: length of `cosine` and `linear`, warm-up included (0: all steps of the stage).
    multipliers: `PATTERN=FACTOR,PATTERN=FACTOR`: the rate of parameters whose path matches a
      regular expression from its start (as in Stage.trainable) is multiplied by a factor above 0.
      The first match counts; other parameters have factor 1. One text rather than a section, as
      keys of sections can't contain the dots of regular expressions.
    b1: decay of the first moment of AdamW; of those parameters that Muon leaves to AdamW, too.
    b2: decay of the second moment, as `b1`.
    eps: term of AdamW's denominator, and of Muon's norms.
    momentum: decay of Muon's momentum.
    mu_dtype: dtype in which first moments and momentum are stored, `float32` or `bfloat16`.
    weight_decay: decoupled decay per step in units of the learning rate; none on biases and scales.
    clip: bound of the global gradient norm (0: off).
    accumulate: number of microbatches that the batch of a step is divided into.
    ema: decay of the parameter average (0: no average).
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
    of = lambda name: _spread(getattr(self, name))
    words = {'name': OPTIMIZERS, 'schedule': SCHEDULES, 'mu_dtype': DTYPES}
    for name, known in words.items():
      good = all(value in known for value in of(name))
      check(self, 'optim.', name, good, f'one of {", ".join(known)}')
    good = all(0 < value < math.inf for value in of('lr'))
    check(self, 'optim.', 'lr', good, 'above 0 and finite')
    for name in ('b1', 'b2', 'momentum', 'ema'):
      good = all(0 <= value < 1 for value in of(name))
      check(self, 'optim.', name, good, 'at least 0 and below 1')
    for name in ('lr_end', 'eps', 'weight_decay', 'clip'):
      good = all(0 <= value < math.inf for value in of(name))
      check(self, 'optim.', name, good, 'at least 0 and finite')
    good = all(_factors(text) is not None for text in of('multipliers'))
    example = 'PATTERN=FACTOR,... with regular expressions and factors above 0, as encoder/=0.5'
    check(self, 'optim.', 'multipliers', good, example)

  @property
  def factors(self) -> tuple[tuple[str, float], ...]:
    """The pairs (regular expression, factor) of `multipliers`; of settings of one stage."""
    return _factors(self.multipliers)

  def of(self, stage: int, steps: int = 0) -> OptimConfig:
    """The settings of one stage: every field is a single value.

    Args:
      stage: its index.
      steps: of the stage, which `decay_steps` of 0 stands for.
    """
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    one = lambda value: value[stage] if isinstance(value, tuple) else value
    settings = {name: one(value) for name, value in values.items()}
    settings['decay_steps'] = settings['decay_steps'] or steps
    return OptimConfig(**settings)

  def check_stages(self, count: int) -> None:
    """Refuses a field that has neither one value nor one a stage."""
    for field in dataclasses.fields(self):
      good = not isinstance(value := getattr(self, field.name), tuple) or len(value) == count
      check(self, 'optim.', field.name, good, f'one value, or one a stage ({count})')


def _factors(text: str) -> tuple[tuple[str, float], ...] | None:
  """The pairs of `optim.multipliers`; None where the text is not a list of them."""
  entries = [entry.rpartition('=') for entry in text.split(',') if entry.strip()]
  try:
    pairs = tuple((re.compile(entry[0].strip()).pattern, float(entry[2])) for entry in entries)
  except (re.error, ValueError):
    return None
  return pairs if all(pattern and 0 < factor < math.inf for pattern, factor in pairs) else None


def _spread(value: Any) -> tuple[Any, ...]:
  return value if isinstance(value, tuple) else (value,)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices as a grid: axis sizes (one may be -1: what is left) and the sharding strategy."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  strategy: str = 'fsdp'


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Saves each `every` steps; keeps the newest `keep` and multiples of `keep_every` (0: none)."""

  every: int = 200
  keep: int = 2
  keep_every: int = 0


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """Sampling settings of a system: base of its `Sampling`, the type of its `sample` section.

  A system that samples composes its own of the groups in vpe_jax.sampling.settings; this one, for
  the others, has none.
  """

  def __post_init__(self) -> None:
    check_sizes(self, 'sample.')


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Console output and profiling.

  Attributes:
    every: steps between two lines.
    profile: step range such as `10:13` that is traced into RUN/profile (empty: none).
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
  """One run. `steps` and `batch_size` have an entry a stage or one for all; so may `optim`'s.

  Attributes:
    name: the config file's name, without folder and ending.
    preset: the size that was asked for (`debug`, `tiny`, `paper`, ...).
    system: a key of vpe_jax.systems.SYSTEMS.
    stages: names of the stages to run, in order.
    steps: optimizer steps of each stage.
    batch_size: global examples per step of each stage.
    seed: of data order, initialisation and noise.
    start: the workdir of another run, whose newest good checkpoint gives a new run all of its
      parameters (empty: none); optimizer, average and data order begin afresh. Groups of parameters
      may come from several: `RUN,dit=RUN2` takes those whose paths begin with `dit/` from the
      second, and `dit=RUN2` alone leaves the others as they are in a run without `start`.
    start_weights: which of its parameters: `raw`, or `ema` where its stage keeps an average. What
      trained in an earlier stage only is at its average in both. `state` carries on more than
      parameters, as if the other run went on: optimizer, average, and its place in the data; steps
      are counted from 0.
    dtype: compute dtype, `float32` or `bfloat16`; parameters are float32 always.
    remat: what the backward pass recomputes: `none`; `full`, everything in a layer; `attention`,
      everything but the attention itself, whose output and log-sum-exp are kept (one more array of
      a layer's output size); `dots`, everything but attention and dense matrix products.
    attention: implementation of the attention, which then runs or raises: `reference` (dense),
      `chunked` (any platform, memory linear in the row), `pallas_tpu`, `pallas_gpu`, `cudnn`;
      empty: chosen by platform and shape. Calls of fewer than 16 queries (decoding) choose always.
    unroll: whether training runs layers one by one instead of scanning over them: faster on CPU,
      where a scan copies what the backward pass needs; compiles longer.
    quick_compile: whether programs are compiled fast rather than to run fast, for runs of seconds.
    model: the system's own section.
    sample: the system's own sampling settings.
    evals: evaluators that run in the training loop, by name (vpe_jax.evaluation.evaluator): each
      has `every`, the steps between two runs (0: never), and its own options. They run at the end
      of each stage, too.
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
  def starts(self) -> dict[str, str]:
    """The runs that `start` names: beginning of parameter paths (all others: empty) -> workdir.

    Raises:
      UserError: `start` names two for the same parameters, or none after a group's `=`.
    """
    entries = self.start.split(',') if _GROUP.search(self.start) else [self.start]
    found: dict[str, str] = {}
    for entry in filter(None, map(str.strip, entries)):
      match = _GROUP.match(entry)
      beginning = f'{match[1]}/' if match else ''
      if beginning in found:
        raise UserError(f"config.start is '{self.start}': two runs for the same parameters")
      found[beginning] = entry[match.end() :] if match else entry
      if not found[beginning]:
        raise UserError(f"config.start is '{self.start}': name a run after {entry}")
    return found

  def optim_of(self, stage: int) -> OptimConfig:
    """The optimizer's settings in one stage; a decay without a length takes all of its steps."""
    return self.optim.of(stage, self.steps[stage])

  def is_started(self, *groups: str) -> bool:
    """Whether `start` names runs for all parameters whose paths begin with these."""
    return bool(self.start) and ('' in self.starts or set(groups) <= self.starts.keys())


def from_dict(
  values: Mapping[str, Any], model: type, sample: type[SampleConfig] = SampleConfig
) -> Config:
  """Builds a Config whose sections `model` and `sample` have these types.

  Raises:
    UserError: a key is unknown, missing, or holds a value of the wrong type or out of range.
  """
  types_of = {'model': model, 'sample': sample}
  config = _build(Config, {'sample': {}, **values}, '', types_of)
  words = {'dtype': DTYPES, 'remat': REMATS, 'attention': ATTENTIONS, 'start_weights': STARTS}
  for name, known in words.items():
    word = getattr(config, name)
    if word not in known and not (name == 'attention' and word == ''):
      raise UserError(f"config.{name} is '{word}'; known: {', '.join(known)}")
  count = len(config.stages)
  if not count:
    raise UserError('config.stages is empty: name the stages to run')
  spread = {}
  for name in ('steps', 'batch_size'):
    given = getattr(config, name)
    if len(given) == 1:
      given = given * count
    if len(given) != count:
      raise UserError(f'config.{name} has {len(given)} entries for {count} stages {config.stages}')
    if min(given, default=1) < 1:
      raise UserError(f'config.{name} is {given}: every stage needs at least 1')
    spread[name] = given
  config.optim.check_stages(count)
  _check_evals(config.evals)
  if config.start_weights == 'state' and set(config.starts) != {''}:
    raise UserError(
      f'config.start_weights is state, which carries the optimizer of one whole run on, and '
      f"config.start is '{config.start}': name one run"
    )
  return dataclasses.replace(config, **spread)


def _check_evals(evals: Mapping[str, Any]) -> None:
  for name, options in evals.items():
    every = options.get('every') if isinstance(options, Mapping) else None
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
      raise UserError(
        f'config.evals.{name} is {options!r}: it must be a section with `every`, the steps between '
        'two runs (0: never), and the options of the evaluator'
      )


def build_section(cls: type, values: Mapping[str, Any]) -> Any:
  """A frozen dataclass of plain values from nested dicts, as `to_dict` makes them.

  Raises:
    UserError: a key is unknown, missing, or holds a value of the wrong type or out of range.
  """
  return _build(cls, dict(values), '', {})


def base_section(section: Any, cls: type) -> Any:
  """The part of a section that its base class `cls` has."""
  return cls(**{field.name: getattr(section, field.name) for field in dataclasses.fields(cls)})


def to_dict(config: Any) -> dict[str, Any]:
  """The config as plain nested dicts and lists: what a checkpoint stores as JSON."""
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
  """Dotted field -> (stored value, our value), for every field in which two configs differ.

  A field that did not exist yet when the other was stored counts as its default.
  """
  # A stored field that exists no more is a difference.
  with contextlib.suppress(UserError):
    stored = to_dict(from_dict(stored, type(ours.model), type(ours.sample)))
  old, new = flatten(stored), flatten(to_dict(ours))
  keys = sorted(old.keys() | new.keys())
  return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}


def nearest(word: str, known: typing.Iterable[str]) -> str:
  """`; did you mean 'x'?` for the known word that is closest, or the list of all of them."""
  known = sorted(known)
  if not known:
    return '; there are none here'
  close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
  return f"; did you mean '{close[0]}'?" if close else f'; known: {", ".join(known)}'


def _build(cls: type, values: Mapping[str, Any], path: str, types_of: Mapping[str, type]) -> Any:
  hints = typing.get_type_hints(cls) | dict(types_of)
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
    raise _OutOfRange(error.name, error.words, path) from error


def _merged(default: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """A section's values; those that are missing come from the section that is the default."""
  if values.get('kind', default.get('kind')) != default.get('kind'):
    return dict(values)  # Of another kind: the default has other fields.
  merged = dict(default)
  for name, value in values.items():
    inner = isinstance(value, Mapping) and isinstance(default.get(name), Mapping)
    merged[name] = _merged(default[name], value) if inner else value
  return merged


def _value(hint: Any, value: Any, path: str) -> Any:
  tagged = isinstance(hint, type) and issubclass(hint, Tagged)
  if dataclasses.is_dataclass(hint) or tagged:
    if not isinstance(value, Mapping):
      raise UserError(f"config key '{path}' must be a section, not {value!r}")
    if tagged:
      if (kind := value.get('kind')) not in hint.KINDS:
        raise UserError(f"config key '{path}.kind' is {kind!r}{nearest(str(kind), hint.KINDS)}")
      hint = hint.KINDS[kind]
    return _build(hint, dict(value), f'{path}.', {})
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None:
      return None
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    many = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    return _value((many if isinstance(value, (tuple, list)) and many else kinds)[0], value, path)
  if origin is Mapping:
    if not isinstance(value, Mapping):
      raise UserError(f"config key '{path}' must be a section, not {value!r}")
    return to_dict(value)
  if origin is tuple:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(_value(typing.get_args(hint)[0], item, path) for item in items)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise UserError(f"config key '{path}' must be {hint.__name__}, not {value!r}")
  return value
