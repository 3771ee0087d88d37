"""Systems of a few hundred parameters that exercise all of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax import rng as randomness
from vpe_jax.checkpoints import weights
from vpe_jax.config import Config, OptimConfig, from_dict
from vpe_jax.contracts import (
  Batch,
  BatchSpec,
  FrozenNetwork,
  Generated,
  LossTerm,
  Params,
  PlansVisually,
  Samples,
  ScoresImages,
  Stage,
  System,
)
from vpe_jax.data.preprocess import prompt_and_image

PIXELS, WIDTH, HIDDEN, TEXT = 192, 16, 24, 32


@dataclasses.dataclass(frozen=True)
class LineModel:
  """The tiny system's model section."""

  weight: float = 1.0


class Rising:
  """A weight of 0.1 for each step, the current one included."""

  def at(self, step):
    return 0.1 * (1 + step)

  def __str__(self):
    return 'rising'


LOSSES = {'tokens': 1.0, 'watched': 0.0}


class LineSystem(System):
  """Predicts each caption token as a number, linearly from the image.

  Parameters `backbone` (frozen in stage `head`) and `head`; a frozen network `encoder`. Losses:
  `tokens` counts real caption tokens, `noise` is sampled per example, `watched` has weight 0.
  """

  stages = (
    Stage('head', ('head/',), LOSSES, ema=False),
    Stage('all', ('backbone/', 'head/'), LOSSES | {'noise': Rising()}, ema=True),
  )
  logical_axes = (
    ('(backbone|head)/kernel', ('embed', None)),
    ('head/bias', (None,)),
  )

  def __init__(self, config: Config, frozen: dict[str, FrozenNetwork] | None = None):
    self.config = config
    self.frozen = frozen or {}
    self.preprocess = prompt_and_image(config.data)

  def init(self, rng):
    first, second = jax.random.split(rng)
    return {
      'backbone': {'kernel': 0.1 * jax.random.normal(first, (WIDTH, HIDDEN))},
      'head': {
        'kernel': 0.1 * jax.random.normal(second, (HIDDEN, TEXT)),
        'bias': jnp.zeros((TEXT,)),
      },
    }

  def networks(self) -> dict[str, Any]:
    """The parameters of `frozen`."""
    return {'encoder': {'kernel': 0.1 * jax.random.normal(jax.random.key(7), (PIXELS, WIDTH))}}

  def frozen_shapes(self) -> Params:
    return jax.eval_shape(self.networks)

  def batch_spec(self, batch_size: int) -> BatchSpec:
    leaf = lambda dtype, *shape: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    text = {'text': leaf(jnp.int32, TEXT), 'text_length': leaf(jnp.int32)}
    return BatchSpec(text | {'image': leaf(jnp.uint8, 8, 8, 3)})

  def batch(self, batch_size: int, start: int = 0) -> Batch:
    """A batch as numpy leaves, with captions of uneven length."""
    rngs = [np.random.default_rng([11, start + index]) for index in range(batch_size)]
    inputs = {
      'text': np.stack([rng.integers(1, 9, TEXT, np.int32) for rng in rngs]),
      'text_length': np.array([rng.integers(1, TEXT + 1) for rng in rngs], np.int32),
      'image': np.stack([rng.integers(0, 256, (8, 8, 3), np.uint8) for rng in rngs]),
    }
    return Batch(np.arange(start, start + batch_size, dtype=np.int32), inputs)

  def counts(self, batch, rng, step, stage):
    counts = {'tokens': jnp.sum(batch.inputs['text_length']).astype(jnp.float32)}
    counts['watched'] = jnp.float32(batch.example.shape[0])
    if 'noise' in stage.losses:
      counts['noise'] = jnp.float32(batch.example.shape[0])
    return counts

  def losses(self, params, frozen, batch, rng, step, stage):
    dtype = jnp.dtype(self.config.dtype)
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    params, frozen = cast(params), cast(frozen)
    text, length = batch.inputs['text'], batch.inputs['text_length']
    x = batch.inputs['image'].reshape(len(text), -1).astype(dtype) / 255
    x = jnp.einsum('BP,PD->BD', x, frozen['encoder']['kernel'])
    hidden = jnp.tanh(jnp.einsum('BD,DH->BH', x, params['backbone']['kernel']))
    guess = jnp.einsum('BH,HT->BT', hidden, params['head']['kernel']) + params['head']['bias']
    guess = guess.astype(jnp.float32)
    is_real = jnp.arange(TEXT) < length[:, None]
    error = jnp.sum(jnp.where(is_real, jnp.square(guess - text % 8 / 8), 0))
    counts = self.counts(batch, rng, step, stage)
    terms = {
      'tokens': LossTerm(error, counts['tokens'], self.config.model.weight * LOSSES['tokens']),
      'watched': LossTerm(jnp.sum(jnp.exp(guess)), counts['watched'], 0.0),
    }
    if 'noise' in stage.losses:
      sample = lambda key: jax.random.normal(key, (HIDDEN,))
      noise = randomness.per_example(sample, rng, 'noise', batch.example)
      weight = stage.weight('noise', step)
      distance = jnp.sum(jnp.square(hidden.astype(jnp.float32) - noise))
      terms['noise'] = LossTerm(distance, counts['noise'], weight)
    return terms

  def tokens(self, stage):
    return TEXT


def make_config(**changes: Any) -> Config:
  values = {
    'name': 'line',
    'preset': 'debug',
    'system': 'line',
    'stages': ('head', 'all'),
    'steps': (2, 4),
    'batch_size': (8,),
    'model': {},
    'data': {'source': 'synthetic', 'examples': 64, 'image_size': 8, 'text_length': TEXT},
    'optim': {'lr': 1e-2, 'warmup': 2},
    'checkpoint': {'every': 2},
    'log': {'every': 1},
    'evals': {},
  }
  return from_dict(values | changes, LineModel)


@pytest.fixture
def line_config():
  """Builds a config: line_config(steps=(1, 2), ...)."""
  return make_config


@pytest.fixture
def line_system():
  """Builds the system of a config: line_system(dtype='bfloat16', ...)."""
  return lambda **changes: LineSystem(make_config(**changes))


@pytest.fixture
def optim():
  """Optimizer settings without warm-up."""
  return lambda **changes: OptimConfig(**({'lr': 1e-2, 'warmup': 0} | changes))


@pytest.fixture
def frozen(tmp_path):
  """A LineSystem's frozen network as a file."""
  path = tmp_path / 'encoder.safetensors'
  weights.save(str(path), LineSystem(make_config()).networks()['encoder'], {}, 'float32')
  return {'encoder': FrozenNetwork(str(path))}


class DrawingSystem(LineSystem, PlansVisually, ScoresImages):
  """A LineSystem with encoders and sampling: codes are brightness, images are flat squares."""

  encodings = 0
  codes = 11  # brightness in tenths
  capabilities = (Samples, PlansVisually, ScoresImages)

  def batch_spec(self, batch_size):
    spec = super().batch_spec(batch_size)
    encoded = {
      'visual_prompt': jax.ShapeDtypeStruct((batch_size, 4), jnp.int32),
      'latents': jax.ShapeDtypeStruct((batch_size, 2, 2, 3), jnp.float32),
    }
    inputs = dict(spec.inputs)
    image = {'image': inputs.pop('image')}
    return BatchSpec(inputs, image, encoded, frozenset(encoded), {'visual_prompt': self.codes})

  drafts = ('visual_prompt',)

  def encode(self, frozen, inputs, keys):
    images = inputs['image']
    self.encodings += images.shape[0] > 1  # counts traces, not the one image of `check_fits`
    small = images.astype(jnp.float32).reshape(images.shape[0], 2, 4, 2, 4, 3).mean((2, 4)) / 255
    codes = jnp.round(small.mean(-1).reshape(-1, 4) * 10).astype(jnp.int32)
    return {'visual_prompt': codes, 'latents': small}

  def losses(self, params, frozen, batch, rng, step, stage):
    # A cached batch has no images: they are decoded to flat squares.
    if 'image' not in batch.inputs:
      image = (255 * self.decode(frozen, batch.encoded, rng)).astype(jnp.uint8)
      batch = dataclasses.replace(batch, inputs={**batch.inputs, 'image': image})
    return super().losses(params, frozen, batch, rng, step, stage)

  def generate(self, params, frozen, request, rng, settings):
    codes = jnp.zeros((request.example.shape[0], 4), jnp.int32)
    codes = request.encoded.get('visual_prompt', codes)
    encoded = {'latents': jnp.repeat(codes.reshape(-1, 2, 2, 1), 3, -1) / 10.0}
    return Generated(self.decode(frozen, encoded, rng), encoded | {'visual_prompt': codes})

  def decode(self, frozen, encoded, rng):
    return jnp.repeat(jnp.repeat(encoded['latents'], 4, 1), 4, 2)

  def reconstruct(self, frozen, images, rng):
    return self.decode(frozen, self.encode(frozen, {'image': images}, rng), rng)

  def similarity(self, frozen, images, inputs):
    # An image matches its own caption by its brightness, other captions slightly.
    own = jnp.eye(images.shape[0])
    return jnp.mean(images, (1, 2, 3))[:, None] * own + 1e-3 * (1 - own)


@pytest.fixture
def drawing_system(frozen):
  """Builds a DrawingSystem on scenes of 8 x 8 pixels: drawing_system(stages=..., ...)."""

  def make(**changes):
    data = {'source': 'scenes', 'examples': 70, 'image_size': 8, 'text_length': TEXT}
    config = make_config(data=data | changes.pop('data', {}), **changes)
    return DrawingSystem(config, frozen)

  return make
