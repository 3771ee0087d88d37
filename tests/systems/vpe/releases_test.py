"""Imports of published generators: they sample as released, and open like any run.

The released samplers are in tests/released.py. Both sides get the same noise: Show-o2's initial
latents, and for LlamaGen the Gumbel noise whose argmax with the log-probabilities is a sample.
"""

from __future__ import annotations

import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import fake_hub, released
from vpe_jax import convert, rng, sharding, systems
from vpe_jax.checkpoints import families, imports, sources, weights
from vpe_jax.checkpoints.conversion import Companions
from vpe_jax.compilation import examine
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.generator import Generator, items_of
from vpe_jax.training import config_file, resume, runs

pytestmark = pytest.mark.parity
CODES, CLASSES = 53, 7  # of the golden LlamaGen


@pytest.fixture(scope='module', autouse=True)
def one_thread():
  """Small products are slower in several threads, and much slower on busy cores."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  with torch.no_grad():
    yield
  torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('released')


@pytest.fixture(scope='module')
def show_o2(root):
  """The golden Show-o2 as published, and its import with a small Wan autoencoder."""
  source = released.show_o2_folder(root / 'show_o2_source')
  torch.manual_seed(0)
  diffusers.AutoencoderKLWan(base_dim=8, z_dim=16).save_pretrained(root / 'wan')
  to, companions = str(root / 'show_o2'), Companions(str(root / 'wan'), 'assets:bpe')
  lines = convert.import_weights('showo2', str(source), to, companions=companions)
  assert f'  image: from {root / "wan"}' in lines and '  tokenizer: from assets:bpe' in lines
  shutil.rmtree(root / 'wan')  # The import has a copy.
  return source, to


@pytest.fixture(scope='module')
def llamagen(root):
  """The golden LlamaGen as published, and its import with the golden VQ tokenizer."""
  source, to = released.GOLDEN / 'llamagen_gpt', str(root / 'llamagen')
  codec = str(released.llamagen_vq_folder(root / 'vq', CODES))
  convert.import_weights('llamagen', str(source), to, companions=Companions(codec))
  shutil.move(codec, root / 'codec')  # The import has a copy.
  return source, to


@pytest.fixture(scope='module')
def show_o2_generator(show_o2):
  return Generator.load(show_o2[1])


def test_reference_networks_equal_the_originals():
  network, io = released.ShowO2(released.GOLDEN / 'showo2'), _io('showo2')
  span, clock = tuple(map(int, io['span'])), float(io['t'][0])
  ids, latents = torch.tensor(io['ids'][0]), torch.tensor(io['latents'][0])
  _assert_close(network.velocity(ids, span, latents, clock), io['velocity'][0], 2e-6)
  network, io = released.LlamaGen(released.GOLDEN / 'llamagen_gpt'), _io('llamagen_gpt')
  logits = network.logits(int(io['classes'][0]), io['idx'][0, :-1])
  _assert_close(logits, io['logits'][0], 2e-6)


def _io(name: str) -> dict[str, np.ndarray]:
  return dict(np.load(released.GOLDEN / name / 'io.npz'))


def _assert_close(ours, theirs, tolerance: float) -> None:
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
  assert error < tolerance, f'relative error {error:.2e}'


def test_show_o2_samples_the_latents_of_the_released_sampler(show_o2, show_o2_generator):
  source, _ = show_o2
  generator, prompt = show_o2_generator, 'a red fox and two green pears'
  settings = generator.settings()
  assert (settings.steps, settings.shift, settings.guidance) == (49, 3.0, 7.5)
  (generated,) = generator(prompt, seed=3, settings=generator.settings(steps=9))
  request = generator.request(items_of(prompt, 1))
  noise = generator.system.experts.renderer.noise(request, rng.run_key(3))[0]
  ids = request.inputs['text'][0, : request.inputs['text_length'][0]].tolist()
  assert len(ids) > 5
  channels_first = torch.tensor(np.asarray(noise)).permute(2, 0, 1)
  expected = released.ShowO2(source).sample(ids, channels_first, 10, 3.0, 7.5)
  _assert_close(generated.encoded['latents'], expected.permute(1, 2, 0), 1e-4)
  assert generated.image.shape == (64, 64, 3)


@pytest.mark.parametrize('changes', [{}, {'top_k': 20, 'temperature': 0.7, 'guidance': 2.0}])
def test_llamagen_samples_the_codes_of_the_released_sampler(llamagen, changes):
  source, to = llamagen
  generator = Generator.load(to)
  settings = generator.settings(**changes)
  prompts = ['0', '6', '6']
  images = generator(prompts, seed=5, settings=settings)
  request = generator.request(items_of(prompts, 1))
  keys = rng.example_keys(rng.run_key(5), 'codes', request.example)
  network = released.LlamaGen(source)
  folded = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(16)))(
    keys
  )
  gumbel = np.asarray(jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (CODES,))))(folded))
  for image, label, noise in zip(images, prompts, gumbel, strict=True):
    choose = lambda index, logits, noise=noise: int(np.argmax(logits + noise[index]))
    sampling = settings.guidance, settings.temperature, settings.top_k
    expected = network.sample(int(label), choose, *sampling)
    np.testing.assert_array_equal(image.encoded['latents'].ravel(), expected)
  own = generator.settings()
  assert (own.guidance, own.temperature, own.top_k, own.top_p) == (4.0, 1.0, 2000, 1.0)


def test_imports_are_complete_and_movable(show_o2, root):
  moved = shutil.copytree(show_o2[1], root / 'elsewhere' / 'copy')
  config = weights.read_config(str(moved))
  assert config['model']['image']['weights'] == f'{moved}/networks/image'
  assert config['data']['tokenizer'] == f'bpe:{moved}/tokenizer/tokenizer.json'
  assert all((moved / name).exists() for name in ('networks/image', 'tokenizer/tokenizer.json'))
  card = (moved / 'README.md').read_text()
  assert 'published weights' in card and 'licence' in card
  sizes, _, _ = imports.read(str(moved), 'showo2')
  published = families.read_sizes('showo2', sources.open_source(str(show_o2[0])))
  assert sizes == published


def test_the_card_of_an_import_names_the_commit_of_its_codec(root, tmp_path, monkeypatch):
  folder = released.llamagen_vq_folder(root / 'hub', CODES)
  files = {path.name: path.read_bytes() for path in folder.iterdir()}
  source, to = str(released.GOLDEN / 'llamagen_gpt'), tmp_path / 'out'
  with fake_hub.serving(monkeypatch, tmp_path / 'cache') as hub:
    commit = hub.publish(files)
    companions = Companions('owner/name')
    convert.import_weights('llamagen', source, str(to), companions=companions)
  assert f'| vqgan | `owner/name@{commit}` |' in (to / 'README.md').read_text()


def test_an_evaluator_reads_an_import(show_o2):
  subject = Subject.load(show_o2[1], 'ema', 4, 0, {'steps': 1})
  evaluator = evaluators.build('heldout', {'batches': 1})
  evaluators.check_fits('heldout', evaluator, subject)
  numbers = evaluator.run(subject).numbers
  assert numbers and all(np.isfinite(value) for value in numbers.values())


def test_a_run_starts_from_an_import_and_its_config(show_o2):
  _, to = show_o2
  system = systems.build(config_file.load(to, {'start': to, 'model.drop': '0.2'}))
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    abstract = resume.abstract_state(system.config, system, 0, mesh)
    state, origins = resume.fresh_state(system, abstract, {}, rng.run_key(0))
  assert set(origins.values()) == {f'{to} (raw)'}
  jax.tree.map(np.testing.assert_array_equal, state['params'], weights.load_run(to)[0])
  with pytest.raises(UserError, match='no optimizer state.*--config.start='):
    runs.run(config_file.load(to, {}), to)


def test_an_import_compiles_as_it_is_loaded(llamagen):
  request = examine.Request('cpu:1', program='sample', images_per_chip=4)
  compiled = examine.build(config_file.load(llamagen[1], {}), request)
  assert compiled.usage.fits and compiled.usage.peak > 0
  assert compiled.job.system.config.sample.guidance == 4.0


def test_missing_codecs_are_one_line_with_a_cure(root, llamagen, tmp_path):
  source = str(released.GOLDEN / 'llamagen_gpt')
  convert_to = lambda **companions: convert.import_weights(
    'llamagen', source, str(tmp_path / 'out'), companions=Companions(**companions)
  )
  with pytest.raises(UserError, match='llamagen_vq .vq_ds16_c2i.pt.*--codec=FOLDER_OR_FILE'):
    convert_to()
  with pytest.raises(UserError, match='but no weights at .*nowhere.*--codec=FOLDER_OR_FILE'):
    convert_to(codec=str(tmp_path / 'nowhere'))
  with pytest.raises(UserError, match='not the codec of this llamagen.*codes is 128, not 53'):
    convert_to(codec=str(released.GOLDEN / 'llamagen_vq'))
  with pytest.raises(UserError, match='--tokenizer=FAMILY:FOLDER'):
    convert_to(codec=str(root / 'codec'), tokenizer='showo2:/nowhere')
  assert not list(tmp_path.iterdir())
  convert_to(wanted=False)
  with pytest.raises(UserError, match='network llamagen alone.*--network_only'):
    Generator.load(str(tmp_path / 'out'))
