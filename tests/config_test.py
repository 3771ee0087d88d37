"""The typed configuration: one-line errors, tagged sections, and defaults."""

import dataclasses

import pytest

from configs import t2i
from vpe_jax import config
from vpe_jax.contracts import UserError
from vpe_jax.models import mot
from vpe_jax.sampling.settings import FlowSampling, TokenSampling


@dataclasses.dataclass(frozen=True)
class _Sampling(FlowSampling, TokenSampling):
  """Settings of flow and tokens."""


@dataclasses.dataclass(frozen=True)
class _Model:
  """An empty model section."""


def _build(key, value):
  values = {
    'name': 'x', 'preset': 'debug', 'system': 'x', 'model': {},
    'stages': ('a', 'b'), 'steps': (1, 2), 'batch_size': (8,),
  }  # fmt: skip
  section, dot, name = key.rpartition('.')
  values |= {section: {name: value}} if dot else {key: value}
  return config.from_dict(values, _Model, _Sampling)


def test_remat_names_are_those_of_the_networks():
  assert set(config.REMATS) == mot.REMAT.keys()


@pytest.mark.parametrize(
  'key, good, bad, message',
  [
    ('dtype', 'bfloat16', 'float16', "config.dtype is 'float16'; known: float32, bfloat16"),
    ('remat', 'dots', 'some', "config.remat is 'some'; known: none, full, attention, dots"),
    ('attention', 'chunked', 'flash', "config.attention is 'flash'; known: reference, chunked, pa"),
    ('name', 'a-b_1.2', '../../x', "config.name is '../../x': it names the run's folder"),
    ('preset', 'tiny', '..', "config.preset is '..': it names the run's folder"),
    ('batch_size', (1,), (10**20,), r'config.batch_size is \(1.*: at most 100,000,000 in a stage'),
    ('optim.lr', 1e-3, 10**400, "'optim.lr' must be float"),
    ('steps', (1, 1), (0, 5), r'config.steps is \(0, 5\): every stage needs at least 1'),
    ('batch_size', (1,), (0,), r'config.batch_size is \(0, 0\): every stage needs at least 1'),
    ('optim.accumulate', 1, 0, "'optim.accumulate' is 0: it must be at least 1"),
    ('optim.ema', 0.0, 1.0, "'optim.ema' is 1.0: it must be at least 0 and below 1"),
    ('optim.ema', 0.999, float('nan'), "'optim.ema' is nan"),
    ('data.near_misses', 0, -1, "'data.near_misses' is -1: it must be at least 0"),
    ('data.workers', 0, -1, "'data.workers' is -1"),
    ('data.image_size', 1, 0, "'data.image_size' is 0"),
    ('data.text_length', 1, 0, "'data.text_length' is 0"),
    ('checkpoint.every', 1, 0, "'checkpoint.every' is 0: it must be at least 1"),
    ('checkpoint.keep', 1, 0, "'checkpoint.keep' is 0: it must be at least 1"),
    ('checkpoint.keep_every', 0, -1, "'checkpoint.keep_every' is -1: it must be at least 0"),
    ('log.every', 1, 0, "'log.every' is 0: it must be at least 1"),
    ('sample.steps', 1, 0, "'sample.steps' is 0: it must be at least 1"),
    ('optim.lr', 1e-3, 0.0, "'optim.lr' is 0.0: it must be above 0 and finite"),
    ('optim.lr', 1e-3, float('inf'), "'optim.lr' is inf"),
    ('optim.warmup', 0, -1, "'optim.warmup' is -1: it must be at least 0"),
    ('optim.b1', 0.0, 1.0, "'optim.b1' is 1.0: it must be at least 0 and below 1"),
    ('optim.b2', 0.0, -0.1, "'optim.b2' is -0.1"),
    ('optim.clip', 0.0, -1.0, "'optim.clip' is -1.0"),
    ('optim.name', 'muon', 'adam', "'optim.name' is 'adam': it must be one of adamw, adafactor"),
    ('optim.schedule', 'rsqrt', 'cos', "'optim.schedule' is 'cos': it must be one of constant"),
    ('optim.mu_dtype', 'bfloat16', 'half', "'optim.mu_dtype' is 'half'"),
    ('optim.multipliers', 'a=.5,(b|c).*=2', 'a=0', "'optim.multipliers' is 'a=0'"),
    ('optim.multipliers', ('', 'a=2'), '(=2', r"'optim.multipliers' is '\(=2'"),
    ('optim.weight_decay', 0.0, float('nan'), "'optim.weight_decay' is nan"),
    ('data.scenes_share', 1.0, 1.01, "'data.scenes_share' is 1.01: it must be between 0 and 1"),
    ('data.encode', 'cached', 'later', "'data.encode' is 'later': it must be one of online, ca"),
    ('data.source', 'folder:x', 'scene', "config.data.source 'scene'; did you mean 'scenes'"),
    ('data.tokenizer', 'qwen2.5:OWNER/NAME', 'assets:bpf', "'data.tokenizer' is 'assets:bpf'"),
    ('data.tokenizer', 'classes:cat,dog', 'cat,dog', "'data.tokenizer' is 'cat,dog'"),
    ('data.prompt_field', 'group', 'class', "'data.prompt_field' is 'class': it must be"),
    ('data.image_size', 8, 10**9, "'data.image_size' is 1000000000: it must be at most"),
    ('stages', ('b', 'c'), (), 'config.stages is empty'),
    ('sample.top_p', 1.0, 0.0, "'sample.top_p' is 0.0"),
    ('sample.min_p', 0.0, 1.5, "'sample.min_p' is 1.5"),
    ('sample.top_k', 0, -1, "'sample.top_k' is -1"),
    ('sample.shift', 1.0, 0.0, "'sample.shift' is 0.0"),
    ('sample.guidance', -1.0, float('inf'), "'sample.guidance' is inf: it must be a finite number"),
    ('sample.temperature', 0.0, float('nan'), "'sample.temperature' is nan"),
  ],
)
def test_errors_of_values_out_of_range_are_one_line(key, good, bad, message):
  _build(key, good)
  with pytest.raises(UserError, match=message) as error:
    _build(key, bad)
  assert '\n' not in str(error.value)


def test_paper_keeps_its_batches_and_pod_has_eight_images_a_chip():
  paper, pod = t2i.get_config('paper'), t2i.get_config('pod,chips=64')
  assert paper.batch_size == (480, 192)
  # Both divide over 32 devices; more chips shard the layers.
  assert (paper.mesh.data * paper.mesh.fsdp, paper.mesh.tensor) == (32, -1)
  assert not any(batch % 32 for batch in paper.batch_size)
  assert pod.batch_size == (512,) and pod.mesh.data == 16
  assert pod.optim.lr == pytest.approx(paper.optim.lr * (512 / 192) ** 0.5)
  examples = [steps * batch for steps, batch in zip(paper.steps, paper.batch_size, strict=True)]
  assert [steps * 512 for steps in pod.steps] == pytest.approx(examples, rel=1e-3)
  assert t2i.get_config('pod').batch_size == (2048,)
  for arg in ('paper,chips=64', 'pod,chips=many', 'pod,chips=0'):
    with pytest.raises(ValueError, match='only with preset pod'):
      t2i.get_config(arg)


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """Sizes with every kind of bound."""

  heads: int
  ends: tuple[int, ...] = (1,)
  depth: int = -1

  def __post_init__(self) -> None:
    config.check_sizes(self)


@dataclasses.dataclass(frozen=True)
class _Nested:
  """A section within a section."""

  tower: _Sizes = _Sizes(1)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'heads': 0}, "'tower.heads' is 0: it must be at least 1"),
    ({'heads': 1, 'ends': (1, 0)}, r"'tower.ends' is \(1, 0\): it must be at least 1"),
    ({'heads': 1, 'depth': -2}, "'tower.depth' is -2: it must be at least -1"),
    ({'heads': 10**9}, "'tower.heads' is 1000000000: it must be at most"),
  ],
)
def test_an_invalid_size_is_named_with_its_section(values, message):
  with pytest.raises(UserError, match=message):
    config.build_section(_Nested, {'tower': values})


@dataclasses.dataclass(frozen=True)
class _Round:
  """One kind of shape."""

  kind: str = 'round'
  radius: int = 1


@dataclasses.dataclass(frozen=True)
class _Square:
  """Another kind of shape."""

  side: int
  kind: str = 'square'


class _Shape(config.Tagged):
  """Any shape."""

  KINDS = {'round': _Round, 'square': _Square, 'rectangle': _Square}


@dataclasses.dataclass(frozen=True)
class _Figure:
  """A section with a tagged one."""

  shape: _Shape = _Round(radius=3)


class TestTagged:
  @pytest.mark.parametrize(
    'values, built',
    [
      ({}, _Round(radius=3)),
      ({'shape': {'kind': 'round'}}, _Round(radius=3)),
      ({'shape': {'radius': 5}}, _Round(radius=5)),
      ({'shape': {'kind': 'square', 'side': 2}}, _Square(2)),
      ({'shape': {'kind': 'rectangle', 'side': 2}}, _Square(2, 'rectangle')),
    ],
  )
  def test_a_section_has_the_fields_of_its_kind(self, values, built):
    section = config.build_section(_Figure, values)
    assert section.shape == built
    assert config.build_section(_Figure, config.to_dict(section)) == section

  @pytest.mark.parametrize(
    'shape, message',
    [
      ({'kind': 'squar'}, "'shape.kind' is 'squar'; did you mean 'square'"),
      ({'kind': 'square', 'radius': 1}, "unknown config key 'shape.radius'"),
      ({'kind': 'square'}, "'shape.side' is missing"),
      (7, "'shape' must be a section"),
    ],
  )
  def test_mistakes_are_named(self, shape, message):
    with pytest.raises(UserError, match=message):
      config.build_section(_Figure, {'shape': shape})


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """A section whose default section differs from the defaults of its own fields."""

  tower: _Sizes = _Sizes(3, depth=5)


def test_fields_missing_from_a_section_keep_its_default():
  built = config.build_section(_Prepared, {'tower': {'ends': (4, 4)}})
  assert built.tower == _Sizes(3, (4, 4), 5)


@pytest.mark.parametrize('value', [None, 1.5, 'abc', True])
def test_a_size_must_be_a_whole_number(value):
  with pytest.raises(UserError, match="'heads' is .*: it must be a whole number"):
    _Sizes(value)


@pytest.mark.parametrize('name', ['lr', 'b1', 'weight_decay', 'multipliers', 'warmup'])
def test_a_field_of_the_optimizer_is_never_none(name):
  with pytest.raises(UserError, match=f"'{name}' must be .*, not None"):
    config.build_section(config.OptimConfig, {name: None})
