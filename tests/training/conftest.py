"""A system of a few hundred parameters that exercises all of training."""

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
from vpe_jax.contracts import Drawing, Examples, LossTerm, Stage

PIXELS, WIDTH, HIDDEN, TEXT = 192, 16, 24, 32


@dataclasses.dataclass(frozen=True)
class LineModel:
  """The tiny system's model section."""

  weight: float = 1.0


class Rising:
  """A weight of 0.1 for each step that was taken, and the one under way."""

  def at(self, step):
    return 0.1 * (1 + step)

  def __str__(self):
    return 'rising'


LOSSES = {'tokens': 1.0, 'watched': 0.0}


class LineSystem:
  """Predicts each caption token as a number, linearly from the picture.

  Parameters `backbone` (frozen in stage `head`) and `head`; a frozen network `encoder`. Losses:
  `tokens` counts real caption tokens, `noise` draws per example, `watched` has weight 0.
  """

  stages = (
    Stage('head', ('head/',), LOSSES, ema=False),
    Stage('all', ('backbone/', 'head/'), LOSSES | {'noise': Rising()}, ema=True),
  )
  logical_axes = (
    ('(backbone|head)/kernel', ('embed', None)),
    ('head/bias', (None,)),
  )

  def __init__(self, config: Config, frozen_weights: dict[str, str] | None = None):
    self.config = config
    self.frozen_weights = frozen_weights or {}

  def init(self, rng):
    first, second = jax.random.split(rng)
    return {
      'backbone': {'kernel': 0.1 * jax.random.normal(first, (WIDTH, HIDDEN))},
      'head': {
        'kernel': 0.1 * jax.random.normal(second, (HIDDEN, TEXT)),
        'bias': jnp.zeros((TEXT,)),
      },
    }

  def frozen(self) -> dict[str, Any]:
    return {'encoder': {'kernel': 0.1 * jax.random.normal(jax.random.key(7), (PIXELS, WIDTH))}}

  def abstract_batch(self, batch_size: int) -> Examples:
    leaf = lambda shape, dtype: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    return Examples(
      leaf((), jnp.int32),
      leaf((TEXT,), jnp.int32),
      leaf((), jnp.int32),
      leaf((8, 8, 3), jnp.uint8),
    )

  def batch(self, batch_size: int, start: int = 0) -> Examples:
    """Examples as numpy leaves, with captions of uneven length."""
    rows = [np.random.default_rng([11, start + row]) for row in range(batch_size)]
    return Examples(
      np.arange(start, start + batch_size, dtype=np.int32),
      np.stack([row.integers(1, 9, TEXT, np.int32) for row in rows]),
      np.array([row.integers(1, TEXT + 1) for row in rows], np.int32),
      np.stack([row.integers(0, 256, (8, 8, 3), np.uint8) for row in rows]),
    )

  def counts(self, batch, rng, step, stage):
    counts = {'tokens': jnp.sum(batch.text_length).astype(jnp.float32)}
    counts['watched'] = jnp.float32(batch.example.shape[0])
    if 'noise' in stage.losses:
      counts['noise'] = jnp.float32(batch.example.shape[0])
    return counts

  def losses(self, params, frozen, batch, rng, step, stage):
    dtype = jnp.dtype(self.config.dtype)
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    params, frozen = cast(params), cast(frozen)
    x = batch.image.reshape(batch.image.shape[0], -1).astype(dtype) / 255
    x = jnp.einsum('BP,PD->BD', x, frozen['encoder']['kernel'])
    hidden = jnp.tanh(jnp.einsum('BD,DH->BH', x, params['backbone']['kernel']))
    guess = jnp.einsum('BH,HT->BT', hidden, params['head']['kernel']) + params['head']['bias']
    guess = guess.astype(jnp.float32)
    is_real = jnp.arange(TEXT) < batch.text_length[:, None]
    error = jnp.sum(jnp.where(is_real, jnp.square(guess - batch.text % 8 / 8), 0))
    counts = self.counts(batch, rng, step, stage)
    terms = {
      'tokens': LossTerm(error, counts['tokens'], self.config.model.weight * LOSSES['tokens']),
      'watched': LossTerm(jnp.sum(jnp.exp(guess)), counts['watched'], 0.0),
    }
    if 'noise' in stage.losses:
      draw = lambda key: jax.random.normal(key, (HIDDEN,))
      noise = randomness.per_example(draw, rng, 'noise', batch.example)
      weight = stage.weight('noise', step)
      distance = jnp.sum(jnp.square(hidden.astype(jnp.float32) - noise))
      terms['noise'] = LossTerm(distance, counts['noise'], weight)
    return terms

  def flops(self, stage):
    return 6.0 * (PIXELS * WIDTH + WIDTH * HIDDEN + HIDDEN * TEXT)

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
    'log': {'every': 1, 'samples': 0, 'evaluate': 0},
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
def frozen_weights(tmp_path):
  """The frozen network as a file: what a LineSystem's `frozen_weights` names."""
  path = tmp_path / 'encoder.safetensors'
  weights.save(str(path), LineSystem(make_config()).frozen()['encoder'], {}, 'float32')
  return {'encoder': str(path)}


class DrawingSystem(LineSystem):
  """A LineSystem that also has encoders and draws: codes are colours, pictures flat squares."""

  encoded = 0
  codes = 11  # brightness in tenths

  def encode(self, frozen, images):
    self.encoded += images.shape[0] > 1  # counts traces, not the one picture of `check_fits`
    small = images.astype(jnp.float32).reshape(images.shape[0], 2, 4, 2, 4, 3).mean((2, 4)) / 255
    codes = jnp.round(small.mean(-1).reshape(-1, 4) * 10).astype(jnp.int32)
    return codes, small

  def generate(self, params, frozen, request, rng, settings):
    codes = jnp.zeros((request.example.shape[0], 4), jnp.int32)
    codes = codes if request.codes is None else request.codes
    latents = jnp.repeat(codes.reshape(-1, 2, 2, 1), 3, -1) / 10.0
    image = jnp.repeat(jnp.repeat(latents, 4, 1), 4, 2)
    return Drawing(image, codes, latents)

  def similarity(self, frozen, images, text, text_length):
    # A picture fits its own caption by its brightness, the others by a little.
    own = jnp.eye(images.shape[0])
    return jnp.mean(images, (1, 2, 3))[:, None] * own + 1e-3 * (1 - own)


@pytest.fixture
def drawing_system(frozen_weights):
  """Builds a DrawingSystem on scenes of 8 x 8 pixels: drawing_system(stages=..., ...)."""

  def make(**changes):
    data = {'source': 'scenes', 'examples': 70, 'image_size': 8, 'text_length': TEXT}
    config = make_config(data=data | changes.pop('data', {}), **changes)
    return DrawingSystem(config, frozen_weights)

  return make
