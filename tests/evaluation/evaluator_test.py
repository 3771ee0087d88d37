"""The subject of an evaluation: kind of prompts, images, and source images of edits."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compilations import compilations
from vpe_jax import sharding
from vpe_jax.checkpoints import weights
from vpe_jax.config import DataConfig, MeshConfig, SampleConfig
from vpe_jax.contracts import BatchSpec, Edits, Generated, Samples, UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.generator import Generator


class _Painter(Edits):
  """A system whose images encode the example id, and in green the source image of an edit."""

  def __init__(self, capabilities, data):
    config = types.SimpleNamespace(system='painter', data=data, sample=SampleConfig(), seed=0)
    self.config, self.capabilities = config, capabilities
    self.source_traces = 0

  def batch_spec(self, batch_size):
    ints = lambda *shape: jax.ShapeDtypeStruct((batch_size, *shape), jnp.int32)
    return BatchSpec({'text': ints(32), 'text_length': ints()})

  def generate(self, params, frozen, request, rng, settings):
    shade = jnp.stack([request.example >> 8, request.example, request.example * 0], -1) % 256 / 255
    if 'source' in request.encoded:
      shade = shade.at[:, 1].set(request.encoded['source'])
    image = jnp.broadcast_to(shade[:, None, None], (len(shade), 16, 16, 3))
    return Generated(image, {})

  def encode_source(self, frozen, images):
    self.source_traces += 1
    return {'source': images[:, 0, 0, 0].astype(jnp.float32) / 255}


def _subject(capabilities=(Samples,), **data):
  system = _Painter(capabilities, DataConfig(image_size=16, **data))
  generator = Generator(system, {}, {}, bpe.shipped(), {'checkpoint': 'abc'})
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  return Subject(system, {}, 0, mesh, load_generator=lambda: generator)


@pytest.mark.parametrize(
  'capabilities, data, task',
  [
    ((Samples,), {}, 'captions'),
    ((Samples,), {'source': 'words'}, 'words'),
    ((Samples,), {'prompt_field': 'group', 'tokenizer': 'classes:a,b'}, 'classes'),
    ((Samples, Edits), {'source': 'edits', 'source_images': True}, 'edits'),
  ],
)
def test_the_kind_of_prompts(capabilities, data, task):
  subject = _subject(capabilities, **data)
  assert subject.task == task and subject.image_size == 16
  assert subject.description['checkpoint'] == 'abc' and subject.notes == ()


def test_a_run_on_user_data_has_a_note(tmp_path):
  assert 'held-out splits' in _subject(source=f'folder:{tmp_path}').notes[0]


def test_a_model_without_images_is_described_by_its_parameters():
  subject = Subject.load('assets:siglip', 'ema', 4, 0, {})
  metadata = weights.load('assets:siglip')[1]
  assert subject.description == {'checkpoint': metadata['fingerprint']}
  assert subject.stage_step == int(metadata['step'])


def test_a_model_without_images_rejects_sampling_settings():
  with pytest.raises(UserError, match='does not generate images'):
    Subject.load('assets:siglip', 'ema', 4, 0, {'guidance': 2.0})


def test_repeated_prompts_give_different_images():
  images = _subject().sample(['a fox', 'a dog', 'a fox'])
  assert images.shape == (3, 16, 16, 3) and len({image.tobytes() for image in images}) == 3


def test_each_edit_has_its_own_source_image():
  source = np.stack([np.full((16, 16, 3), shade, np.uint8) for shade in (10, 200, 30)])
  subject = _subject((Samples, Edits), source_images=True).editing(source)
  images = subject.sample(['make it red', 'make it blue', 'make it red'])
  assert images[:, 0, 0, 1].tolist() == [10, 200, 30]


def test_the_encoder_of_source_images_is_compiled_ahead():
  subject = _subject((Samples, Edits), source_images=True)
  assert len([lowered.compile() for lowered in subject.sampling_programs()]) == 3
  with compilations() as observed:
    subject.editing(np.zeros((16, 16, 3), np.uint8))
  assert 'encode_source' not in observed.all


def test_source_images_are_encoded_by_one_program():
  subject = _subject((Samples, Edits), source_images=True)
  for shade in (10, 200):
    subject.editing(np.full((16, 16, 3), shade, np.uint8))
  assert subject.system.source_traces == 1
