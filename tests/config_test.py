"""Tests of the typed configuration: values out of range are one line."""

import dataclasses

import pytest

from configs import t2i
from vpe_jax import config
from vpe_jax.contracts import UserError
from vpe_jax.models import mot


@dataclasses.dataclass(frozen=True)
class _Model:
  """An empty model section."""


def _build(key, value):
  values = {
    'name': 'x', 'preset': 'debug', 'system': 'x', 'model': {},
    'stages': ('a', 'b'), 'steps': (1, 2), 'batch_size': (8,),
  }  # fmt: skip
  section, dot, name = key.rpartition('.')
  return config.from_dict(values | ({section: {name: value}} if dot else {key: value}), _Model)


def test_remat_names_are_those_of_the_networks():
  assert set(config.REMATS) == mot.REMAT.keys()


@pytest.mark.parametrize(
  'key, good, bad, message',
  [
    ('dtype', 'bfloat16', 'float16', "config.dtype is 'float16'; known: float32, bfloat16"),
    ('remat', 'dots', 'some', "config.remat is 'some'; known: none, full, attention, dots"),
    ('attention', 'chunked', 'flash', "config.attention is 'flash'; known: reference, chunked, pa"),
    ('steps', (1, 1), (0, 5), r'config.steps is \(0, 5\): every stage needs at least 1'),
    ('batch_size', (1,), (0,), r'config.batch_size is \(0, 0\): every stage needs at least 1'),
    ('optim.accumulate', 1, 0, "'optim.accumulate' is 0: it must be at least 1"),
    ('optim.ema', 0.0, 1.0, "'optim.ema' is 1.0: it must be at least 0 and below 1"),
    ('optim.ema', 0.999, float('nan'), "'optim.ema' is nan"),
    ('data.near_misses', 0, -1, "'data.near_misses' is -1: it must be at least 0"),
    ('data.workers', 0, -1, "'data.workers' is -1"),
    ('data.image_size', 1, 0, "'data.image_size' is 0"),
    ('data.text_length', 1, 0, "'data.text_length' is 0"),
    ('log.samples', 0, -1, "'log.samples' is -1"),
    ('log.evaluate', 0, -5, "'log.evaluate' is -5"),
    ('log.every', 1, 0, "'log.every' is 0: it must be at least 1"),
    ('sample.steps', 1, 0, "'sample.steps' is 0: it must be at least 1"),
    ('sample.guidance', -1.0, float('inf'), "'sample.guidance' is inf: it must be a finite number"),
    ('sample.temperature', 0.0, float('nan'), "'sample.temperature' is nan"),
  ],
)
def test_values_out_of_range_are_one_line(key, good, bad, message):
  _build(key, good)
  with pytest.raises(UserError, match=message) as error:
    _build(key, bad)
  assert '\n' not in str(error.value)


def test_paper_keeps_its_batches_and_pod_has_eight_images_a_chip():
  paper, pod = t2i.get_config('paper'), t2i.get_config('pod,chips=64')
  assert paper.batch_size == (480, 192)
  # Both divide over 32 devices; further chips work within the layers.
  assert (paper.mesh.data * paper.mesh.fsdp, paper.mesh.tensor) == (32, -1)
  assert not any(batch % 32 for batch in paper.batch_size)
  assert pod.batch_size == (512,) and pod.mesh.data == 16
  assert pod.optim.lr == pytest.approx(paper.optim.lr * (512 / 192) ** 0.5)
  seen = [steps * batch for steps, batch in zip(paper.steps, paper.batch_size, strict=True)]
  assert [steps * 512 for steps in pod.steps] == pytest.approx(seen, rel=1e-3)
  assert t2i.get_config('pod').batch_size == (2048,)
  for arg in ('paper,chips=64', 'pod,chips=many'):
    with pytest.raises(ValueError, match='of the preset pod only'):
      t2i.get_config(arg)
