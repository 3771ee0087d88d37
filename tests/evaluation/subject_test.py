"""What benchmarks see of a generator: its task, its pictures and plans, in the same places."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.config import DataConfig
from vpe_jax.contracts import Drawing
from vpe_jax.data.tokenizers import bpe
from vpe_jax.evaluation.subject import subject
from vpe_jax.generator import Generator
from vpe_jax.systems.t2i import Sampling


class _Painter:
  """It paints the example's identity, and in green what it sees of a picture before."""

  codes = 0

  def __init__(self, data):
    self.config = types.SimpleNamespace(data=data, sample=Sampling())

  def generate(self, params, frozen, request, rng, settings):
    shade = jnp.stack([request.example >> 8, request.example, request.example * 0], -1) % 256 / 255
    if request.reference_latents is not None:
      shade = shade.at[:, 1].set(request.reference_latents[:, 0, 0, 0])
    image = jnp.broadcast_to(shade[:, None, None], (len(shade), 16, 16, 3))
    return Drawing(image, jnp.zeros((len(shade), 0), jnp.int32), image)


class _Editor(_Painter):
  def encode_reference(self, frozen, images):
    return images[:, :1, :1].astype(jnp.float32) / 255


def _generator(system=_Painter, **data):
  painter = system(DataConfig(image_size=16, **data))
  return Generator(painter, {}, {}, bpe.shipped(), {'checkpoint': 'abc'})


@pytest.mark.parametrize(
  'system, data, task',
  [
    (_Painter, {}, 'captions'),
    (_Painter, {'source': 'words'}, 'words'),
    (_Painter, {'words': 'group', 'tokenizer': 'classes:a,b'}, 'classes'),
    (_Editor, {'source': 'edits', 'references': True}, 'edits'),
  ],
)
def test_a_run_says_what_it_draws_from(system, data, task):
  found = subject(_generator(system, **data), Sampling(), 0)
  assert found.task == task and (found.editing is not None) == (task == 'edits')
  assert found.planner is None and found.image_size == 16 and found.data.source
  assert found.description['checkpoint'] == 'abc'


def test_a_caption_that_comes_again_is_drawn_anew():
  drawn = subject(_generator(), Sampling(), 0).draw(['a fox', 'a dog', 'a fox'])
  assert drawn.shape == (3, 16, 16, 3) and len({image.tobytes() for image in drawn}) == 3


def test_each_edit_has_a_picture_of_its_own():
  before = np.stack([np.full((16, 16, 3), shade, np.uint8) for shade in (10, 200, 30)])
  editing = subject(_generator(_Editor, references=True), Sampling(), 0).editing
  drawn = editing(before).draw(['make it red', 'make it blue', 'make it red'])
  assert drawn[:, 0, 0, 1].tolist() == [10, 200, 30]
