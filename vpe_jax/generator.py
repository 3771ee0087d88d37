"""Generates images from prompts with the weights of a run: the Python API of vpe_jax.sample.

Generation takes two programs: the first samples the entries that the system drafts, the second
renders the image from them. A saved draft is rendered by the same second program, so it gives the
same image again.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from vpe_jax import __version__, rng, sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.checkpoints import model as model_lib
from vpe_jax.checkpoints import weights as weights_io
from vpe_jax.checkpoints.model import Model
from vpe_jax.config import MeshConfig, SampleConfig, did_you_mean
from vpe_jax.contracts import (
  Array,
  Batch,
  Edits,
  Params,
  Samples,
  System,
  UserError,
  require,
  supports,
)
from vpe_jax.data.tokenizers import bpe
from vpe_jax.data.tokenizers.published import open_tokenizer
from vpe_jax.data.transforms import to_square
from vpe_jax.sampling import batches
from vpe_jax.sampling.batches import Progress
from vpe_jax.sampling.images import GeneratedImage, to_uint8


class Item(NamedTuple):
  """One image to generate: its prompt, and its index among the images of that prompt."""

  prompt: str
  index: int


class SourceImages(NamedTuple):
  """Encoded source images of an edit (name -> array), and their fingerprint.

  Each entry is [N, ...]: N is 1 (one image for all requests) or the number of requests.
  """

  encoded: Mapping[str, np.ndarray]
  fingerprint: str


class Generator:
  """A loaded model: `Generator.load('runs/t2i-tiny')('a red fox', n=4, seed=0)`.

  Images are always generated in batches of `batch_size` (short ones are padded, long ones split),
  and the randomness of an image is a function of seed, prompt and index. So an image does
  not depend on the other images of a call or on their order.

  Attributes:
    system: the system, which supports Samples.
    params: its parameters, prepared for sampling.
    frozen: its frozen networks.
    batch_size: images per batch.
    metadata: provenance of the weights, for image files.
  """

  def __init__(
    self,
    system: Samples,
    params: Params,
    frozen: Params,
    tokenizer: bpe.Tokens,
    metadata: Mapping[str, str],
    batch_size: int = 4,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Wraps networks that are already in memory; most callers need `load` instead.

    Args:
      system: a system that supports Samples.
      params: its parameters, as checkpoints store them.
      frozen: its frozen networks.
      tokenizer: converts prompts to token ids.
      metadata: provenance of the weights (keys `checkpoint` and `weights`).
      batch_size: at least 4, because smaller matrix products round differently.
      mesh: mesh of the devices that hold the parameters; None for one device.
    """
    if batch_size < 4:
      raise UserError(f'batch_size is {batch_size}: images are reproducible from 4 on')
    self.system = system
    self.batch_size = batch_size
    self.metadata = dict(metadata)
    self.params = jax.device_put(system.prepare(params, jax.default_backend()))
    self.frozen = jax.device_put(frozen)
    self._tokenizer = tokenizer
    self._source: SourceImages | None = None
    self._mesh = mesh
    # Results are replicated, because every process reads them.
    jit_options = {} if mesh is None else {'out_shardings': sharding.replicated(mesh)}
    self._draft = jax.jit(system.draft, static_argnums=3, **jit_options)
    self._generate = jax.jit(system.generate, static_argnums=4, **jit_options)
    self._encode_drafts = jax.jit(system.encode_drafts, **jit_options)
    self._reconstruct = jax.jit(system.reconstruct, **jit_options)
    if supports(system, Edits):
      self._encode_source = jax.jit(system.encode_source, **jit_options)

  @classmethod
  def load(
    cls,
    workdir: str,
    weights: str = 'ema',
    batch_size: int = 4,
    step: int | None = None,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ) -> Generator:
    """Loads a checkpoint of a run, or shipped weights, shard by shard onto the devices.

    Logs a warning if parameters are still random because the run has not reached its last stage.

    Args:
      workdir: the folder of a run (local or gs://), `assets:tiny`, or a weight file.
      weights: `ema` (the moving average; raw values of parameters without one) or `raw` (the
        parameters of the last step).
      batch_size: images per batch, at least 4.
      step: step of the checkpoint; None: the newest intact one.
      dtype: dtype of parameters and computation, `float32` or `bfloat16`; None: float32 on a CPU,
        else bfloat16.
      mesh: mesh of the devices; None: all of this process, or the first for a small model.

    Raises:
      UserError: the run, checkpoint or asset doesn't exist, its system does not generate images,
        or its weights are damaged or don't fit its config.
    """
    return cls.of(model_lib.load(workdir, weights, step, dtype, mesh), batch_size)

  @classmethod
  def of(cls, model: Model, batch_size: int = 4) -> Generator:
    """Makes the generator of a loaded model; warnings and errors are those of `load`."""
    system = require(model.system, Samples)
    if frozen_lib.is_synthetic(system):
      raise UserError(
        f'{model.source} was trained on synthetic latents, so it has no decoder: name a run that '
        'was trained on images'
      )
    _warn_if_untrained(model)
    frozen = frozen_lib.load_for_sampling(system, model.mesh)
    frozen_lib.check_sampling(system, model.params, frozen)
    tokenizer = open_tokenizer(system.config.data.tokenizer)
    options = model.metadata, batch_size, model.mesh
    return cls(system, model.params, frozen, tokenizer, *options)

  def editing(self, source: np.ndarray) -> Generator:
    """Makes a generator whose prompts are instructions for editing images.

    Args:
      source: source images, uint8: [H, W, 3] for all requests, or [N, H, W, 3] for a call that
        generates N images. They are made square as in training.

    Raises:
      UserError: the model does not edit images, or `source` has another shape or dtype.
    """
    if not supports(self.system, Edits):
      raise UserError(
        'this model generates images from prompts only: leave out the source image, or name a run '
        'of configs/edit.py'
      )
    squares = _source_squares(self.system, source)
    encoded = self.batched(lambda batch: self._encode_source(self.frozen, batch), squares)
    editor = copy.copy(self)
    editor._source = SourceImages(encoded, weights_io.fingerprint(encoded))
    editor.metadata = self.metadata | {'source_image': editor._source.fingerprint}
    return editor

  def settings(self, **overrides: Any) -> SampleConfig:
    """The run's sampling settings, with overrides; None keeps the run's value.

    Raises:
      UserError: a name is not a sampling setting of the system, or a value is out of range.
    """
    own = self.system.config.sample
    known = [field.name for field in dataclasses.fields(own)]
    for name in overrides:
      if name not in known:
        raise UserError(f"this model has no sampling setting '{name}'{did_you_mean(name, known)}")
    values = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(own, **values)

  def __call__(
    self,
    prompts: str | Sequence[str],
    n: int = 1,
    seed: int = 0,
    settings: SampleConfig | None = None,
    fixed: Mapping[str, np.ndarray] | None = None,
    progress: Progress | None = None,
  ) -> list[GeneratedImage]:
    """Generates `n` images for each prompt, prompt by prompt.

    Args:
      prompts: one or several prompts; a repeated prompt continues with its next `n` images.
      n: images per prompt.
      seed: sampling seed, shared by all images.
      settings: from `self.settings(...)`; None: those of the run.
      fixed: encoded entries that replace the model's drafts, by name: one array for all images, or
        [len(prompts) * n, ...].
      progress: called with (images finished, total images) after each batch.

    Raises:
      UserError: there is no prompt; a prompt is blank, too long or not text; a setting is out of
        range; a fixed entry is not a draft of the model or has the wrong shape; or an image is not
        finite.
    """
    items = items_of(prompts, n)
    request = self.request(items)
    if fixed:
      request = self._with_fixed(request, fixed)
    return self.render(request, items, seed, settings, progress)

  def draft(
    self,
    items: Sequence[Item],
    seed: int = 0,
    settings: SampleConfig | None = None,
    progress: Progress | None = None,
  ) -> dict[str, np.ndarray]:
    """Samples the drafts of N items (name -> [N, ...]), without rendering images."""
    key, settings = rng.run_key(seed), settings or self.settings()
    draft = lambda batch: self._draft(self.params, batch, key, settings)
    return self.batched(draft, self.request(items), progress)

  def read_drafts(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Encodes N images to drafts (name -> [N, ...]) with the frozen encoders, as in training.

    Args:
      images: uint8 [H, W, 3] each, of any shape. They are made square as in training.

    Raises:
      UserError: the model was trained on synthetic drafts, or the encoders can't be loaded.
    """
    data = self.system.config.data
    side = self.system.draft_image_side or data.image_size
    squares = np.stack([to_square(image, side, data.fit) for image in images])
    return self.batched(lambda batch: self._encode_drafts(self.draft_networks, batch), squares)

  def reconstruct(self, images: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """Encodes N images and decodes them with the image codec, without the model.

    Args:
      images: uint8 [H, W, 3] each, of any shape. They are made square as in training.
      seed: seed of a stochastic decoder.

    Returns:
      Images [N, R, R, 3] uint8.
    """
    key, data = rng.run_key(seed), self.system.config.data
    squares = np.stack([to_square(image, data.image_size, data.fit) for image in images])
    return to_uint8(self.batched(lambda batch: self._reconstruct(self.frozen, batch, key), squares))

  @functools.cached_property
  def draft_networks(self) -> Params:
    """The networks that encode images to drafts; sampling does not need them."""
    names = self.system.draft_encoders
    if all(name in self.frozen for name in names):
      return {name: self.frozen[name] for name in names}
    mesh = self._mesh or sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    return frozen_lib.load_draft_encoders(self.system, mesh)

  def with_params(self, params: Params, **metadata: str) -> Generator:
    """Makes a generator with other parameters that shares the compiled programs.

    Args:
      params: parameters, as checkpoints store them.
      **metadata: provenance of the parameters, where it differs.
    """
    generator = copy.copy(self)
    generator.metadata = self.metadata | metadata
    generator.params = jax.device_put(self.system.prepare(params, jax.default_backend()))
    return generator

  def render(
    self,
    request: Batch,
    items: Sequence[Item],
    seed: int = 0,
    settings: SampleConfig | None = None,
    progress: Progress | None = None,
  ) -> list[GeneratedImage]:
    """Generates an image for each element of a request from its encoded entries.

    Args:
      request: from `self.request`. Drafts that it lacks are sampled first.
      items: prompt and index of each element.
      seed: sampling seed, shared by all images.
      settings: from `self.settings(...)`; None: those of the run.
      progress: called with (images finished, total images) after each batch.

    Raises:
      UserError: an image is not finite.
    """
    key, settings = rng.run_key(seed), settings or self.settings()

    def generate(batch: Batch) -> tuple[Array, Mapping[str, Array]]:
      if not batch.encoded.keys() >= set(self.system.drafts):
        drafts = self._draft(self.params, batch, key, settings)
        batch = dataclasses.replace(batch, encoded={**drafts, **batch.encoded})
      generated = self._generate(self.params, self.frozen, batch, key, settings)
      return generated.image, generated.encoded

    pixels, encoded = self.batched(generate, request, progress)
    metadata = self.describe(settings) | {'seed': str(seed)}
    return [
      GeneratedImage(
        image,
        item.prompt,
        item.index,
        seed,
        {name: leaf[i] for name, leaf in encoded.items()},
        metadata | {'prompt': item.prompt, 'index': str(item.index)},
      )
      for i, (image, item) in enumerate(zip(to_uint8(pixels), items, strict=True))
    ]

  def batched(
    self, run: Callable[[Any], Any], inputs: Any, progress: Progress | None = None
  ) -> Any:
    """Maps `run` over inputs [N, ...] in batches of `batch_size`; see sampling.batches."""
    with self._on_mesh():
      return batches.in_batches(run, inputs, self.batch_size, progress)

  def request(self, items: Sequence[Item], **encoded: np.ndarray) -> Batch:
    """Makes a batch of requests as numpy arrays, one per item; fixes the entries in `encoded`."""
    prompts = list(dict.fromkeys(item.prompt for item in items))
    ids, lengths = self._tokenizer.encode_batch(prompts, self.system.config.data.text_length)
    index_of = {prompt: index for index, prompt in enumerate(prompts)}
    indices = [index_of[item.prompt] for item in items]
    example = np.asarray([_example_id(item) for item in items], np.int32)
    source = self._source_entries(len(items))
    inputs = {'text': ids[indices], 'text_length': lengths[indices]}
    return Batch(example, inputs, {**source, **encoded})

  def programs(self, settings: SampleConfig) -> list[jax.stages.Lowered]:
    """The programs that generate, encode and decode a batch, lowered for compilation ahead."""
    system, size = self.system, self.batch_size
    spec, request, key = system.batch_spec(size), system.request_spec(size), rng.run_key(0)
    drafts = {name: spec.encoded[name] for name in system.drafts}
    complete = dataclasses.replace(request, encoded={**request.encoded, **drafts})
    side = system.config.data.image_size
    images_of = lambda side: jax.ShapeDtypeStruct((size, side, side, 3), np.uint8)
    with self._on_mesh():
      lowered = [
        self._generate.lower(self.params, self.frozen, complete, key, settings),
        self._reconstruct.lower(self.frozen, images_of(side), key),
      ]
      if drafts:
        lowered.append(self._draft.lower(self.params, request, key, settings))
      if drafts and set(system.draft_encoders) <= set(self.frozen):
        images = images_of(system.draft_image_side or side)
        lowered.append(self._encode_drafts.lower(self.draft_networks, images))
      if supports(system, Edits):
        lowered.append(self._encode_source.lower(self.frozen, images_of(side)))
    return lowered

  def describe(self, settings: SampleConfig) -> dict[str, str]:
    """Provenance of images generated with `settings`: weights, settings and version."""
    return self.metadata | {
      'settings': json.dumps(dataclasses.asdict(settings)),
      'version': f'vpe_jax {__version__}',
      'generated': 'true',
    }

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """Context of all calls: the networks shard their activations over the mesh."""
    return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

  def _source_entries(self, count: int) -> dict[str, np.ndarray]:
    """Encoded source images for `count` requests; none for a system that does not edit."""
    if not supports(self.system, Edits):
      return {}
    if self._source is None:
      raise UserError(
        'this model edits images: name a source image with --image=FILE (in Python: '
        'generator.editing(image))'
      )
    encoded = self._source.encoded
    sources = len(next(iter(encoded.values())))
    if sources not in (1, count):
      raise UserError(
        f'{sources} images to edit and {count} to generate: give one for all, or one for each'
      )
    return {name: np.broadcast_to(x, (count, *x.shape[1:])) for name, x in encoded.items()}

  def _with_fixed(self, request: Batch, fixed: Mapping[str, np.ndarray]) -> Batch:
    """Adds fixed entries to a request after checking them."""
    count, spec = len(request.example), self.system.batch_spec(1)
    encoded = dict(request.encoded)
    for name, array in fixed.items():
      if name not in self.system.drafts:
        raise UserError(f"this model drafts no '{name}'{did_you_mean(name, self.system.drafts)}")
      expected = (count, *spec.encoded[name].shape[1:])
      dtype, array = spec.encoded[name].dtype, np.asarray(array)
      if array.shape not in (expected, expected[1:]):
        raise UserError(f'{name} has shape {array.shape}: {expected} or {expected[1:]} is needed')
      if not np.can_cast(array.dtype, dtype, 'same_kind'):
        raise UserError(f'{name} has dtype {array.dtype}: {dtype} is needed, convert it first')
      last = spec.codebooks.get(name, 0) - 1
      if last >= 0 and not 0 <= array.min() <= array.max() <= last:
        raise UserError(
          f'{name} has codes from {array.min()} to {array.max()}: the codebook has 0 to {last}'
        )
      encoded[name] = np.broadcast_to(array.astype(dtype), expected)
    return dataclasses.replace(request, encoded=encoded)


def items_of(prompts: str | Sequence[str], n: int) -> list[Item]:
  """Prompt and index of each image, prompt by prompt.

  Raises:
    UserError: there is nothing to generate, or a prompt is blank.
  """
  prompts = bpe.tidied([prompts] if isinstance(prompts, str) else prompts)
  if not prompts or n < 1:
    raise UserError(
      f'nothing to generate: {len(prompts)} prompts with n={n} images each; name a '
      'prompt, and n of at least 1'
    )
  counters = collections.defaultdict(itertools.count)
  return [Item(prompt, next(counters[prompt])) for prompt in prompts for _ in range(n)]


def _example_id(item: Item) -> int:
  """The int32 that keys the randomness of an image, together with the seed."""
  return zlib.crc32(f'{item.prompt}\0{item.index}'.encode()) & 0x7FFFFFFF


def _source_squares(system: System, source: np.ndarray) -> np.ndarray:
  """Checks source images and makes them square: uint8 [N, R, R, 3]."""
  source = np.asarray(source)
  if source.dtype != np.uint8:
    raise UserError(
      f'an image to edit has dtype {source.dtype}: uint8 from 0 to 255 is needed (pass the '
      '.image of a generated image)'
    )
  if source.ndim not in (3, 4) or source.shape[-1] != 3 or not source.size:
    raise UserError(
      f'an image to edit has shape {source.shape}: [H, W, 3] is needed, or [N, H, W, 3]'
    )
  data = system.config.data
  stack = source if source.ndim == 4 else source[None]
  return np.stack([to_square(image, data.image_size, data.fit) for image in stack])


def _warn_if_untrained(model: Model) -> None:
  """Logs a warning if images would be noise because the renderer has not been trained."""
  stage, last = model.system.stages[model.stage], model.system.stages[-1]
  if stage is not last:
    logging.warning(
      "%s stopped in stage '%s'; its images are noise until stage '%s' has trained: the command "
      'that started the run continues it',
      model.source,
      stage.name,
      last.name,
    )
  elif not last.samples and (untrained := _untrained(model.system, model.params)):
    logging.warning(
      "%s has no stage after '%s', and its %s is untrained: its images are noise. Start another "
      'run, with a stage that trains it, from this one (config.start)',
      model.source,
      stage.name,
      ', '.join(untrained),
    )


def _untrained(system: System, params: Params) -> list[str]:
  """The groups of parameters that no stage of a run trains and no parent run provides."""
  paths = sharding.leaves_by_path(params)
  trained = {p.split('/')[0] for p in paths for stage in system.stages if stage.trains(p)}
  groups = dict.fromkeys(path.split('/')[0] for path in paths)
  return [g for g in groups if g not in trained and not system.config.has_parent(f'{g}/')]
