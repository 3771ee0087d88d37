"""Contracts between the packages: batches, losses, stages, systems and their capabilities.

Axis letters of einsums and shape annotations, unless a docstring defines others:
  B batch, L tokens in a sequence, S keys, N query heads, K key/value heads, H head width,
  D model width, V vocabulary, P patches, C channels, F frames, R side of a square image in
  pixels; G = N // K query heads per key/value head.

Time: t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t eps, and networks predict v = eps - x.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]  # a plain nested dict of arrays
State = dict[str, Any]  # a run's COUNTERS, params, opt_state and ema; see training/state.py
COUNTERS = ('stage', 'step', 'stage_step', 'examples_seen')  # integers of a State


class UserError(ValueError):
  """A mistake that a user can fix; the message is one line that names the mistake and the fix.

  The commands print it as `error: ...` and exit with status 2.
  """


def _pytree(cls):
  """Makes a frozen dataclass whose fields are all pytree children."""
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Visibility:
  """Who may attend to whom: four int32 per token, all `[B, L]`.

  A query sees a key if since[q] <= order[k] < reach[q] and order[q] < until[k]. `order` is the
  index in the logical sequence and continues over packed samples; tokens may be stored in another
  order. An absent token has since = reach = until = 0: it sees nothing and nothing sees it.

  A sequence of text `a b`, an absent token `.`, and a bidirectional image `x y`:

          a b . x y      order 0 1 0 2 3
      a   1 0 0 0 0      since 0 0 0 0 0
      b   1 1 0 0 0      reach 1 2 0 4 4
      .   0 0 0 0 0      until 9 9 0 9 9   (9 stands for the largest int32)
      x   1 1 0 1 1
      y   1 1 0 1 1

  The query side (order, since, reach) and the key side (order, until) may come from different
  arrays: a call with a KV cache passes its own tokens as queries and all cached slots as keys.
  """

  order: Array
  since: Array
  reach: Array
  until: Array

  def __getitem__(self, index) -> Visibility:
    return jax.tree.map(lambda leaf: leaf[index], self)


def visible(query: Visibility, key: Visibility) -> Array:
  """The attention mask of queries [B, L] and keys [B, S]: bool [B, L, S]."""
  order = key.order[:, None, :]
  return (
    (query.since[:, :, None] <= order)
    & (order < query.reach[:, :, None])
    & (query.order[:, :, None] < key.until[:, None, :])
  )


def concatenate(parts: list[Any], axis: int = 1) -> Any:
  """Concatenates pytrees of equal structure (Visibility, Region) along an axis."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *parts)


@_pytree
class Batch:
  """A batch of training examples or of sampling requests; BatchSpec declares the arrays.

  Attributes:
    example: [B] int32, which keys the randomness of each element: the position in the data stream
      or, in a request, a hash of the prompt and the index of its image.
    inputs: arrays that the data pipeline yields, by name, each `[B, ...]`.
    encoded: outputs of frozen encoders, by name, each `[B, ...]`: read from the cache, or empty if
      the encoders run online. In a request: entries that the caller fixes.
  """

  example: Array
  inputs: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  encoded: Mapping[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
  """Names, shapes and dtypes of a system's batches, as `jax.ShapeDtypeStruct` leaves `[B, ...]`.

  Attributes:
    inputs: arrays that every batch has.
    encoder_inputs: arrays that only frozen encoders read, such as images; a batch lacks them if
      all encoded entries come from the cache.
    encoded: outputs of the frozen encoders.
    cacheable: names of the encoded entries that the cache may store: those that depend on the
      example alone. The others are computed online.
    codebooks: codebook sizes of the encoded entries that are codes.
  """

  inputs: Mapping[str, Any]
  encoder_inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  encoded: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  cacheable: frozenset[str] = frozenset()
  codebooks: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def input_names(self, cached: bool) -> frozenset[str]:
    """Names of the arrays that the pipeline yields, with or without a cache."""
    complete = cached and self.cacheable == self.encoded.keys()
    return frozenset(self.inputs) | (frozenset() if complete else frozenset(self.encoder_inputs))

  def batch(self, cached: bool) -> Batch:
    """The input of the training step, as shapes."""
    names, known = self.input_names(cached), {**self.inputs, **self.encoder_inputs}
    size, *_ = next(iter(known.values())).shape
    example = jax.ShapeDtypeStruct((size,), jnp.int32)
    encoded = {name: self.encoded[name] for name in sorted(self.cacheable)} if cached else {}
    return Batch(example, {name: known[name] for name in sorted(names)}, encoded)


@_pytree
class Region:
  """The tokens of one expert, all `[B, L]`; each expert's tokens are stored separately.

  `ids` index the joint vocabulary; they are 0 in slots whose embedding doesn't come from it.
  `targets` are the ids to predict from these tokens, `weights` (float32) their weights in the loss;
  both are 0 where nothing is predicted.
  """

  ids: Array
  positions: Array
  visibility: Visibility
  targets: Array
  weights: Array


@_pytree
class LossTerm:
  """A loss: a sum over elements, their count, and the weight of sum / count in the total loss.

  Counts depend on batch, rng and step only, never on parameters, so they are known for all
  microbatches of a step before the first one runs. A term with a weight of exactly 0.0 (a Python
  float) is logged only and computes no gradient.
  """

  sum: Array
  count: Array
  weight: Array | float


@_pytree
class Generated:
  """Generated images of a batch of requests.

  Attributes:
    image: [B, R, R, 3] float32 in [0, 1].
    encoded: entries that the image was decoded from or conditioned on, by the names of the
      system's BatchSpec, such as `latents`.
  """

  image: Array
  encoded: Mapping[str, Array]


class Weight(Protocol):
  """A loss weight that depends on the step of the stage; `str` describes the schedule."""

  def at(self, step: Array | int) -> Array:
    """The weight at a step, a float32 scalar."""
    ...


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run: which parameters train, and which losses drive them.

  Attributes:
    name: name on the command line and in logs.
    trainable: regular expressions over parameter paths such as `ar/layers/q/kernel`; a leaf
      that none of them matches from its start (`re.match`) is frozen.
    losses: weights of the loss terms that this stage computes; 0.0: logged only.
    ema: whether the trainable leaves have a moving average (`optim.ema` of 0 disables it).
    samples: whether to render samples during the stage; false until the renderer has trained.
    monitored: names of further loss terms that held-out evaluation computes, at weight 0.
    training: true in a training step; false in held-out evaluation, which drops no activations.
  """

  name: str
  trainable: tuple[str, ...]
  losses: Mapping[str, float | Weight]
  ema: bool
  samples: bool = True
  monitored: tuple[str, ...] = ()
  training: bool = True

  @property
  def unweighted(self) -> tuple[str, ...]:
    """Names of loss terms that are logged only, such as an accuracy."""
    return tuple(name for name, weight in self.losses.items() if weight == 0.0)

  def trains(self, path: str) -> bool:
    """Whether the parameter at a path trains in this stage."""
    return any(re.match(pattern, path) for pattern in self.trainable)

  def weight(self, loss: str, step: Array | int) -> Array | float:
    """The weight of a loss at a step of the stage, as a LossTerm takes it."""
    weight = self.losses[loss]
    return weight if isinstance(weight, (int, float)) else weight.at(step)


DTYPES = ('float32', 'bfloat16')  # choices for computation and for frozen weights
PARENT = 'run'  # `PretrainedWeights.family` if the source is the parent run


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
  """Weights that exist before a run: published ones, or copies of a parent run's parameters.

  Attributes:
    family: name of the published network's family (vpe_jax.checkpoints.families), or PARENT.
    source: a folder of published weights, an import of them by vpe_jax.convert, or a hub id.
    sizes: sizes of the network, an instance of the family's `Sizes`.
    paths: pairs (path prefix in the family's tree, path prefix in our parameters). A subtree in
      several pairs is copied to each target; a subtree in none is not used.
  """

  family: str
  source: str
  sizes: Any
  paths: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
  """A network that never trains, such as an encoder or decoder.

  Attributes:
    source: source of the weights: `assets:NAME`, a path or a hub id.
    published: the published network; None for weights trained by this library.
    dtype: dtype of the parameters when they are loaded and sharded, `float32` or `bfloat16`. The
      network computes in its own dtype.
  """

  source: str
  published: PretrainedWeights | None = None
  dtype: str = 'float32'

  def __post_init__(self) -> None:
    if self.dtype not in DTYPES:
      raise UserError(
        f"weights_dtype={self.dtype} of the frozen network '{self.source}' is unknown: choose "
        f'one of {", ".join(DTYPES)}'
      )


@dataclasses.dataclass(frozen=True)
class Initialization:
  """Sources of a run's initial parameters, besides random initialization and parent runs.

  Attributes:
    pretrained: published weights of parameters that no parent run provides.
    grown: initializers for parameters missing from the parent run.
    optional: regular expressions over paths of parameters that may be missing from the parent run
      and are then initialized randomly.
    from_frozen: pairs (path prefix, description of the origin) of parameters that `System.inherit`
      takes from frozen networks.
  """

  pretrained: tuple[PretrainedWeights, ...] = ()
  grown: tuple[PretrainedWeights, ...] = ()
  optional: tuple[str, ...] = ()
  from_frozen: tuple[tuple[str, str], ...] = ()


class Preprocess(Protocol):
  """The host side of a system: converts a record to named arrays. Pickled for reader processes.

  Attributes:
    tokenizer: converts prompts to token ids.
  """

  tokenizer: Any

  def __call__(
    self, record: Any, names: Collection[str], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """The arrays `names` of one example; `rng` is a function of seed and stream position."""
    ...

  def prompt(self, record: Any) -> str:
    """The text that the example is conditioned on."""
    ...


class System(Protocol):
  """A model with its losses and its frozen networks: the interface of all systems.

  `params` is the tree that checkpoints store. `frozen` has the networks that never train; it is an
  argument of every jitted call, is never closed over, and is not part of checkpoints. Systems
  subclass this protocol and the capabilities below, and list the capabilities that they have.

  Attributes:
    config: the configuration of the run (vpe_jax.config.Config).
    stages: the stages of the config, in order.
    logical_axes: pairs (regular expression over parameter paths, axis names of that leaf); the
      first match counts. The names are those of vpe_jax.sharding.
    frozen: the frozen networks by name.
    initialization: sources of the initial parameters.
    capabilities: the capability protocols that this system implements with its config.
    preprocess: host-side function from records to the inputs of `batch_spec`.
    encoder_settings: JSON-serializable settings on which the encoded entries depend, besides the
      weights and the images. If encoders read prompts, these include `tokenizer`, `text_length`
      and `prompt_field` of the data section.
  """

  config: Any
  stages: tuple[Stage, ...]
  logical_axes: tuple[tuple[str, tuple[str | None, ...]], ...]
  frozen: Mapping[str, FrozenNetwork] = MappingProxyType({})
  initialization: Initialization = Initialization()
  capabilities: tuple[type, ...] = ()
  preprocess: Preprocess
  encoder_settings: Mapping[str, Any] = MappingProxyType({})

  def init(self, rng: Array) -> Params:
    """Random initial parameters; pure and jittable."""
    ...

  def inherit(self, params: Params, frozen: Params, rng: Array) -> Params:
    """Takes the parameters of `initialization.from_frozen` from `frozen`; pure and jittable."""
    del frozen, rng
    return params

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """Names, shapes and dtypes of one batch."""
    ...

  def frozen_shapes(self) -> Params:
    """Parameters of the frozen networks by name, as trees of `jax.ShapeDtypeStruct`.

    Their dtypes are those of initialization; `checkpoints.frozen.abstract_params` converts them to
    `FrozenNetwork.dtype`.
    """
    return {}

  def encode(self, frozen: Params, inputs: Mapping[str, Array], keys: Array) -> dict[str, Array]:
    """Computes the encoded entries of `batch_spec` from its inputs with the frozen networks.

    `keys` has one random key per example [B], for encoders that sample.
    """
    del frozen, inputs, keys
    return {}

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """The counts that `losses` returns for this batch, computed without parameters."""
    ...

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """Every loss term of the stage. `rng` is the run's key; `step` counts within the stage."""
    ...

  def tokens(self, stage: Stage) -> int:
    """Tokens that the transformer processes for one training example."""
    ...


class Samples(System, Protocol):
  """Capability: generates images from requests.

  Attributes:
    sampling_networks: names of the frozen networks that `generate` reads.
    drafts: encoded entries that `draft` samples before rendering, such as codes of image features.
    draft_encoders: names of the frozen networks that `encode_drafts` reads.
    draft_image_side: side in pixels of the images that `encode_drafts` reads; 0 for
      `data.image_size`.
  """

  UNSUPPORTED: ClassVar[str] = 'does not generate images'

  sampling_networks: tuple[str, ...]
  drafts: tuple[str, ...] = ()
  draft_encoders: tuple[str, ...] = ()
  draft_image_side: int = 0

  def prepare(self, params: Params, platform: str = '') -> Params:
    """Converts parameters to the layout in which sampling is fast on a platform; called once."""
    del platform
    return params

  def request_spec(self, batch_size: int) -> Batch:
    """The arrays that every request has, as shapes."""
    example = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return Batch(example, self.batch_spec(batch_size).inputs)

  def draft(self, params: Params, request: Batch, rng: Array, settings: Any) -> dict[str, Array]:
    """Samples the entries `drafts` for requests that lack them, without rendering."""
    del params, request, rng, settings
    return {}

  def encode_drafts(self, frozen: Params, images: Array) -> dict[str, Array]:
    """Encodes images [B, R, R, 3] uint8 to the entries `drafts`, as in training."""
    del frozen, images
    return {}

  def generate(
    self, params: Params, frozen: Params, request: Batch, rng: Array, settings: Any
  ) -> Generated:
    """Generates one image per request; pure and jittable with `settings` static.

    `request.inputs` has the prompts. `request.example` keys the randomness of each element, which
    therefore doesn't depend on the other elements. Entries of `request.encoded` replace those that
    the model would sample.
    """
    ...

  def decode(self, frozen: Params, encoded: Mapping[str, Array], rng: Array) -> Array:
    """Decodes encoded entries to images [B, R, R, 3] float32 in [0, 1]."""
    ...

  def reconstruct(self, frozen: Params, images: Array, rng: Array) -> Array:
    """Encodes images [B, R, R, 3] uint8 and decodes them, with networks of `sampling_networks`."""
    ...


class Edits(Samples, Protocol):
  """Capability: generates images from a source image and an instruction."""

  UNSUPPORTED: ClassVar[str] = 'does not edit images'

  def encode_source(self, frozen: Params, images: Array) -> dict[str, Array]:
    """Encodes source images [B, R, R, 3] uint8 with the networks of `sampling_networks`."""
    ...


class ScoresImages(Samples, Protocol):
  """Capability: scores how well images fit prompts, with the system's own frozen networks.

  The scores serve to monitor a run. To evaluate one, use the independent evaluator network of
  vpe_jax.evaluation.
  """

  UNSUPPORTED: ClassVar[str] = 'has no text tower that compares images with prompts'

  def similarity(self, frozen: Params, images: Array, inputs: Mapping[str, Array]) -> Array:
    """Cosine similarities [B, B]: images [B, R, R, 3] in [0, 1] (axis 0) x prompts (axis 1)."""
    ...


class PlansVisually(Samples, Protocol):
  """Capability: drafts a visual prompt, the image's content in discrete codes [B, P].

  Attributes:
    visual_prompt: the codec of visual prompts (vpe_jax.codecs.protocol.FeatureCodec).
    codes: number of entries of its codebook.
    plan_rankers: ranking criteria: `likelihood`, and `similarity` where `plan_similarity` exists.
  """

  UNSUPPORTED: ClassVar[str] = 'does not write visual prompts'

  visual_prompt: Any
  codes: int
  plan_rankers: tuple[str, ...]

  def plan_likelihood(self, params: Params, request: Batch) -> Array:
    """Mean log-probability [B], in nats, of the request's visual prompts given its prompts.

    It is computed by the conditional model at temperature 1, in one pass over the sequence.
    """
    ...

  def plan_similarity(self, frozen: Params, request: Batch) -> Array:
    """Cosine similarities [B] of the request's visual prompts and prompts; see `plan_rankers`."""
    ...


Capability = TypeVar('Capability')


def supports(system: System, capability: type) -> bool:
  """Whether a system declares a capability."""
  return capability in system.capabilities


def require(system: System, capability: type[Capability]) -> Capability:
  """Returns the system, typed as one with the capability.

  Raises:
    UserError: the system does not declare the capability.
  """
  if not supports(system, capability):
    raise UserError(f"the system '{system.config.system}' {capability.UNSUPPORTED}")
  return system
