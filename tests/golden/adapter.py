"""The interface of golden numbers to the library.

record.py and check.py use the library through this module only. Leaves of parameters, gradients and
averages are passed by their paths in the recorded commit (`renamed`), batches as plain arrays by
name: example, text, text_length, image, codes, latents, near, near_length, reference,
reference_latents.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden.cases import Case
from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import convert, weights
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.contracts import Batch, PlansVisually, supports
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.evaluation import heldout
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.generator import Generator
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import config_file, encode
from vpe_jax.training.state import first_state, merge, split_trainable
from vpe_jax.training.step import make_train_step

Arrays = dict[str, np.ndarray]

# Names in the record -> names of inputs and encoded entries.
_INPUTS = {name: name for name in ('text', 'text_length', 'image', 'near', 'near_length')}
_INPUTS |= {'reference': 'source_image'}
_ENCODED = {
  'codes': 'visual_prompt',
  'latents': 'latents',
  'reference_latents': 'source_latents',
}
# Networks and stages -> their names in the record.
_RECORDED = {'feature_vq': 'visual_prompt'}

SAMPLE_SEED = 7
INIT_SEED = 0
_CACHE = Path(tempfile.gettempdir()) / 'vpe_jax_golden_xla'


@dataclasses.dataclass(frozen=True)
class Setup:
  """A system with its frozen networks, and the key of its run."""

  config: Any
  system: Any
  frozen: Any
  mesh: Any
  key: Any


def begin(folder: str) -> None:
  """Sets up this process: `folder` for codes and latents, and a cache for compiled programs."""
  os.environ['VPE_JAX_CACHE'] = folder
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(_CACHE))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


# Names in paths -> names in the record.
_PATHS = {'cross/context_norm/': 'cross/memory_norm/', 'embed/prefix': 'embed/plan'}


def renamed(path: str) -> str:
  """The path of a leaf in the recorded commit."""
  network, slash, rest = path.partition('/')
  path = f'{_RECORDED.get(network, network)}{slash}{rest}'
  for name, recorded in _PATHS.items():
    path = path.replace(name, recorded)
  return path


def values_of(config: str, overrides: Mapping[str, str]) -> dict[str, Any]:
  """A config as plain nested dicts; `overrides` have the field names of the recorded commit."""
  ours = dict(overrides)
  if shift := ours.pop('model.time_shift', None):
    by_resolution = float(shift) == 0
    ours['model.flow.shift'] = '1.0' if by_resolution else shift
    ours['model.flow.shift_by'] = 'resolution' if by_resolution else 'constant'
  return config_file.load(config, ours)


def make(case: Case) -> Setup:
  """Builds the system of a case and loads its frozen networks."""
  jax.clear_caches()  # Frees the programs of the previous case.
  jax.config.update('jax_disable_most_optimizations', case.quick)
  system = systems.build(values_of(case.config, case.overrides))
  config = system.config
  mesh = sharding.make_mesh(config.mesh)
  frozen = frozen_lib.load(system, mesh, config.mesh.strategy)
  return Setup(config, system, frozen, mesh, rng.run_key(config.seed))


def stages(setup: Setup) -> list[str]:
  """The names of the stages in the recorded commit."""
  return [_RECORDED.get(stage.name, stage.name) for stage in setup.system.stages]


def shapes(setup: Setup) -> dict[str, tuple[int, ...]]:
  """The shape of each parameter, by its recorded path."""
  leaves = leaves_by_path(jax.eval_shape(setup.system.init, rng.run_key(INIT_SEED)))
  return {renamed(path): leaf.shape for path, leaf in leaves.items()}


def same_name(setup: Setup) -> set[str]:
  """Recorded paths that parameters still have."""
  leaves = leaves_by_path(jax.eval_shape(setup.system.init, rng.run_key(INIT_SEED)))
  return {path for path in leaves if renamed(path) == path}


def parameters(setup: Setup, leaves: Mapping[str, np.ndarray]) -> Any:
  """A tree of parameters from leaves by their recorded paths."""
  abstract = leaves_by_path(jax.eval_shape(setup.system.init, rng.run_key(INIT_SEED)))
  return convert.tree({path: jnp.asarray(leaves[renamed(path)]) for path in abstract})


def leaves_of(tree: Any) -> Arrays:
  """The leaves of parameters, a gradient or an average by their recorded paths, as numpy arrays."""
  return {renamed(path): np.asarray(leaf) for path, leaf in leaves_by_path(tree).items()}


def initial(setup: Setup) -> tuple[Arrays, Arrays | None]:
  """Initial parameters, and the same with inherited embeddings if there are any."""
  params = jax.jit(setup.system.init)(rng.run_key(INIT_SEED))
  if not setup.system.initialization.from_frozen:
    return leaves_of(params), None
  key = rng.stream(rng.run_key(INIT_SEED), 'inherit')
  inherited = jax.jit(setup.system.inherit)(params, setup.frozen.params, key)
  return leaves_of(params), leaves_of(inherited)


def read_batches(setup: Setup, index: int, count: int) -> tuple[list[Arrays], Arrays, Arrays]:
  """Batches of a stage from the real pipeline.

  Args:
    setup: the system.
    index: number of the stage.
    count: number of training batches.

  Returns:
    The first training batches; the first held-out batch from the pipeline; and the same batch as
    held-out evaluation encodes it, with codes and latents.
  """
  config, size = setup.config, setup.config.batch_size[index]
  data = encode.open_training_data(config, setup.system, setup.frozen, setup.mesh)
  with data.batches(0, size) as batches:
    training = [_arrays(setup, batch) for batch in itertools.islice(batches, count)]
  with Pipeline.of(setup.system, heldout.SPLIT).batches(0, size) as batches:
    raw = _arrays(setup, next(batches))
  held_out = heldout.HeldOut(batches=1)._read(_subject(setup, {}, index))[0]
  return training, raw, _arrays(setup, held_out)


def batch_of(arrays: Mapping[str, np.ndarray]) -> Batch:
  """A batch from plain arrays; codes [B, 0] mean a model without visual prompts."""
  leaves = {name: jnp.asarray(array) for name, array in arrays.items() if array.size}
  inputs = {_INPUTS[name]: leaf for name, leaf in leaves.items() if name in _INPUTS}
  encoded = {_ENCODED[name]: leaf for name, leaf in leaves.items() if name in _ENCODED}
  return Batch(leaves['example'], inputs, encoded)


def first_losses(
  setup: Setup, index: int, params: Any, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, tuple[float, float, float]], Arrays]:
  """Sum, count and weight of every loss term at the first step, and the gradient of the total."""
  stage, system = setup.system.stages[index], setup.system
  batch, step = batch_of(arrays), jnp.zeros((), jnp.int32)

  def run(params: Any, frozen: Any, batch: Batch) -> Any:
    trainable, fixed = split_trainable(params, stage)

    def objective(trainable: Any) -> Any:
      terms = system.losses(merge(trainable, fixed), frozen, batch, setup.key, step, stage)
      parts = [t.weight * t.sum / jnp.maximum(t.count, 1) for t in terms.values()
               if not (isinstance(t.weight, (int, float)) and t.weight == 0.0)]  # fmt: skip
      return sum(parts), {n: (t.sum, t.count, jnp.asarray(t.weight)) for n, t in terms.items()}

    return jax.grad(objective, has_aux=True)(trainable)

  gradient, terms = jax.device_get(jax.jit(run)(params, setup.frozen.params, batch))
  numbers = {name: tuple(map(float, term)) for name, term in terms.items()}
  return numbers, leaves_of(gradient)


def train(
  setup: Setup, index: int, params: Any, batches: Sequence[Mapping[str, np.ndarray]], steps: int
) -> tuple[list[dict[str, float]], Any]:
  """Trains a stage from these parameters, cycling through the batches.

  Returns:
    The logged metrics of each step, and the final state.
  """
  stage, optim = setup.system.stages[index], setup.config.optim_of(index)
  step = make_train_step(setup.system, stage, optim)
  state = fresh_state(setup, index, params)
  ready, logged = [batch_of(arrays) for arrays in batches], []
  for number in range(steps):
    state, metrics = step(state, setup.frozen.params, ready[number % len(ready)], setup.key)
    logged.append({name: float(value) for name, value in metrics.items()})
  return logged, state


def trained(state: Any) -> tuple[Arrays, Arrays]:
  """Parameters and averages of a state."""
  return leaves_of(state['params']), leaves_of(state['ema'])


def fresh_state(setup: Setup, index: int, params: Any) -> Any:
  """The state before the first step of a stage."""
  # Copies the parameters, as training steps donate the state; compiled as one program.
  state = jax.jit(lambda params: first_state(params, setup.system.stages[index]))(params)
  return state | {'stage': jnp.asarray(index, jnp.int32)}


class HeldOut:
  """Held-out losses of a stage on one batch, computed as in training."""

  def __init__(self, setup: Setup, arrays: Mapping[str, np.ndarray]):
    self._setup = setup
    self._inner = heldout.HeldOut()
    self._inner._read = lambda subject: [batch_of(arrays)]

  def __call__(self, state: Any) -> dict[str, float]:
    params, index = merge(state['ema'], state['params']), int(state['stage'])
    subject = _subject(self._setup, params, index, state['stage_step'])
    return dict(self._inner.run(subject).numbers)


class Sampler:
  """Samples for four requests, with parameters prepared as in a generator."""

  def __init__(self, setup: Setup, params: Any, arrays: Mapping[str, np.ndarray]):
    """Takes a held-out batch, whose first four examples are the requests."""
    self._system, self._frozen = setup.system, setup.frozen.params
    prepared = setup.system.prepare(jax.device_get(params), jax.default_backend())
    self._params = jax.device_put(prepared)
    names = ('example', 'text', 'text_length', 'reference_latents')
    first = {name: arrays[name][:4] for name in names if name in arrays}
    self._request = batch_of(first)
    self._plans = supports(setup.system, PlansVisually)
    self._codes = jnp.asarray(arrays['codes'][:4]) if self._plans else None
    self._run = jax.jit(setup.system.generate, static_argnums=4)
    self._own = setup.config.sample

  def __call__(self, name: str, overrides: Mapping[str, float]) -> Arrays:
    """`codes`, `latents` and `image` (uint8) of one set of samples."""
    known = {field.name for field in dataclasses.fields(self._own)}
    overrides = {name: value for name, value in overrides.items() if name in known}
    settings = dataclasses.replace(self._own, **overrides)
    request = self._given if name == 'given' else self._request
    key = rng.run_key(SAMPLE_SEED)
    generated = self._run(self._params, self._frozen, request, key, settings)
    image = np.asarray(generated.image)
    return {
      'codes': np.asarray(generated.encoded.get('visual_prompt', np.zeros((4, 0), np.int32))),
      'latents': np.asarray(generated.encoded['latents']),
      'image': np.round(255 * np.clip(image, 0, 1)).astype(np.uint8),
    }

  def scores(self) -> Arrays:
    """Sampled visual prompts `plan` [4, P]; and scores [4] of the ground-truth visual prompts."""
    system, scores = self._system, {}
    if not self._plans:
      return scores
    draft, key = jax.jit(system.draft, static_argnums=3), rng.run_key(SAMPLE_SEED)
    drafts = draft(self._params, self._request, key, self._own)
    scores['plan'] = np.asarray(drafts['visual_prompt'])
    likelihood = jax.jit(system.plan_likelihood)(self._params, self._given)
    scores['plan_likelihood'] = np.asarray(likelihood)
    if 'similarity' in system.plan_rankers:
      similarity = jax.jit(system.plan_similarity)(self._frozen, self._given)
      scores['plan_similarity'] = np.asarray(similarity)
    return scores

  @property
  def _given(self) -> Batch:
    encoded = {**self._request.encoded, 'visual_prompt': self._codes}
    return dataclasses.replace(self._request, encoded=encoded)


def figures(system: Any, index: int) -> dict[str, float]:
  """Tokens of one example of a stage."""
  return {'tokens': float(system.tokens(system.stages[index]))}


def shipped() -> Arrays:
  """The leaves of `assets:tiny` by their recorded paths."""
  return leaves_of(weights.load('assets:tiny')[0])


def shipped_images(prompts: Sequence[str]) -> Arrays:
  """Images and codes, as `python -m vpe_jax.sample --seed=0` generates them."""
  generated = Generator.load('assets:tiny')(list(prompts), n=1, seed=0)
  return {
    'image': np.stack([image.image for image in generated]),
    'codes': np.stack([image.encoded['visual_prompt'] for image in generated]),
  }


def _arrays(setup: Setup, batch: Batch) -> Arrays:
  """A batch as plain arrays by their recorded names."""
  arrays = {'example': np.asarray(batch.example)}
  for names, leaves in ((_INPUTS, batch.inputs), (_ENCODED, batch.encoded)):
    arrays |= {name: np.asarray(leaves[ours]) for name, ours in names.items() if ours in leaves}
  if batch.encoded and 'codes' not in arrays:
    arrays['codes'] = np.zeros((len(batch.example), 0), np.int32)
  return arrays


def _subject(setup: Setup, params: Any, index: int, stage_step: Any = 0) -> Subject:
  return Subject(
    setup.system, params, index, setup.mesh, stage_step=stage_step, load_frozen=lambda: setup.frozen
  )
