"""Contracts between rooms: axis letters, batches, losses, stages, systems and capabilities.

Axis letters, used in every einsum and shape annotation:
  B batch, L tokens in a sequence, S keys, N query heads, K key/value heads, H head width,
  D model width, V vocabulary, P patches, C channels, F frames; G = N // K query heads per
  key/value head.

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


class UserError(ValueError):
  """A mistake that a user can cure: one line, which names the mistake and the cure.

  Front doors print it as `error: ...` and exit with status 2.
  """


def _pytree(cls):
  """Makes a frozen dataclass whose fields are all pytree children."""
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Visibility:
  """Who may attend to whom: four int32 per token, all `[B, L]`.

  A query sees a key if since[q] <= order[k] < reach[q] and order[q] < until[k]. `order` is the
  place in the logical sequence and runs on over a packed row; storage order is free. An absent
  token has since = reach = until = 0: it sees nothing and nothing sees it.

  A row of text `a b`, an absent token `.`, and a bidirectional image `x y`:

          a b . x y      order 0 1 0 2 3
      a   1 0 0 0 0      since 0 0 0 0 0
      b   1 1 0 0 0      reach 1 2 0 4 4
      .   0 0 0 0 0      until 9 9 0 9 9   (9 stands for the largest int32)
      x   1 1 0 1 1
      y   1 1 0 1 1

  The query side (order, since, reach) and the key side (order, until) may come from different
  arrays: a cached call passes the visibility of its own tokens and that of all cached slots.
  """

  order: Array
  since: Array
  reach: Array
  until: Array

  def __getitem__(self, index) -> Visibility:
    return jax.tree.map(lambda leaf: leaf[index], self)


def visible(query: Visibility, key: Visibility) -> Array:
  """The mask that `query` rows [B, L] and `key` rows [B, S] stand for: bool [B, L, S]."""
  order = key.order[:, None, :]
  return (
    (query.since[:, :, None] <= order)
    & (order < query.reach[:, :, None])
    & (query.order[:, :, None] < key.until[:, None, :])
  )


def concatenate(parts: list[Any], axis: int = 1) -> Any:
  """Joins equal pytrees of arrays (Visibility, Region) along one axis."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *parts)


@_pytree
class Batch:
  """One batch, or one batch of sampling requests: named arrays, as the system declares them.

  Attributes:
    example: [B] int32, the position in the data stream; keys the randomness of each example.
    inputs: arrays that the data pipeline yields, by name, each `[B, ...]`.
    encoded: outputs of frozen encoders, by name, each `[B, ...]`: read from the cache, or empty
      where the encoders run online. In a request, entries that the caller fixes.
  """

  example: Array
  inputs: Mapping[str, Array] = dataclasses.field(default_factory=dict)
  encoded: Mapping[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
  """Names, shapes and dtypes of a system's batches, as `jax.ShapeDtypeStruct` leaves `[B, ...]`.

  Attributes:
    inputs: arrays that every batch has.
    encoder_inputs: arrays that only frozen encoders read, such as images; a batch lacks them where
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
    """Arrays that the pipeline yields, with or without a cache."""
    complete = cached and self.cacheable == self.encoded.keys()
    return frozenset(self.inputs) | (frozenset() if complete else frozenset(self.encoder_inputs))

  def batch(self, cached: bool) -> Batch:
    """The batch that the training step sees, as shapes."""
    names, known = self.input_names(cached), {**self.inputs, **self.encoder_inputs}
    size, *_ = next(iter(known.values())).shape
    example = jax.ShapeDtypeStruct((size,), jnp.int32)
    encoded = {name: self.encoded[name] for name in sorted(self.cacheable)} if cached else {}
    return Batch(example, {name: known[name] for name in sorted(names)}, encoded)


@_pytree
class Region:
  """The tokens of one expert, all `[B, L]`: storage is expert by expert.

  `ids` index the joint vocabulary; slots that get their embedding from elsewhere hold 0. `targets`
  is the id that this token's output must predict, `weights` (float32) its weight in the loss; 0
  where nothing is predicted.
  """

  ids: Array
  positions: Array
  visibility: Visibility
  targets: Array
  weights: Array


@_pytree
class LossTerm:
  """A loss as a sum over elements, their count, and the weight of sum / count in the total.

  Counts depend on batch, rng and step only, never on parameters: they are known for a whole step
  before its first microbatch. A weight of exactly 0.0 (a Python float) marks a term that is
  logged and takes no part in the gradient.
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
  """The weight of a loss that depends on the step of the stage; `str` says how."""

  def at(self, step: Array | int) -> Array:
    """The weight at a step, a float32 scalar."""
    ...


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run: which parameters train, and which losses drive them.

  Attributes:
    name: word used on the command line and in the logs.
    trainable: regular expressions over parameter paths such as `ar/layers/q/kernel`; a leaf
      that none of them matches from its start (`re.match`) is frozen.
    losses: the loss terms that this stage computes, and the weight of each; 0.0 is only logged.
    ema: whether a moving average of the trainable leaves is kept (with `optim.ema` of 0 none is).
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

  def trains(self, path: str) -> bool:
    """Whether the parameter at a path trains in this stage."""
    return any(re.match(pattern, path) for pattern in self.trainable)

  def weight(self, loss: str, step: Array | int) -> Array | float:
    """The weight of a loss at a step of the stage, as a LossTerm takes it."""
    weight = self.losses[loss]
    return weight if isinstance(weight, (int, float)) else weight.at(step)


FROZEN_DTYPES = ('float32', 'bfloat16')
PARENT = 'run'  # the family of a PretrainedWeights whose source is the parent run


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
  """Weights that exist before a run: published ones, or copies of a parent run's parameters.

  Attributes:
    family: of the published network (vpe_jax.checkpoints.families), or PARENT.
    source: a folder of published weights, an import of them, or a hub id.
    sizes: of the network, as the family's `Sizes`.
    paths: pairs (path prefix in the family's tree, path prefix in ours). A subtree that several
      pairs name is copied; one that none names is not used.
  """

  family: str
  source: str
  sizes: Any
  paths: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
  """A network that never trains: encoders and decoders.

  Attributes:
    source: where its weights are: `assets:NAME`, a path or a hub id.
    published: the published network, read by its family; None for a file of our own weights.
    dtype: of its parameters, `float32` or `bfloat16`: they are loaded, converted and sharded at
      this dtype. The network computes in its own dtype.
  """

  source: str
  published: PretrainedWeights | None = None
  dtype: str = 'float32'

  def __post_init__(self) -> None:
    if self.dtype not in FROZEN_DTYPES:
      raise UserError(
        f"weights_dtype={self.dtype} of the frozen network '{self.source}' is unknown: choose "
        f'one of {", ".join(FROZEN_DTYPES)}'
      )


@dataclasses.dataclass(frozen=True)
class Initialization:
  """Where a run's first parameters come from, beside random initialization and a parent run.

  Attributes:
    pretrained: published weights for a run without a parent run.
    grown: weights for parameters that the parent run lacks.
    optional: regular expressions over paths of parameters that the parent run may lack; they are
      initialized at random then.
    from_frozen: pairs (path prefix, origin in words) of parameters that `System.inherit` takes from
      frozen networks.
  """

  pretrained: tuple[PretrainedWeights, ...] = ()
  grown: tuple[PretrainedWeights, ...] = ()
  optional: tuple[str, ...] = ()
  from_frozen: tuple[tuple[str, str], ...] = ()


class Preprocess(Protocol):
  """The host side of a system: from a record to named arrays. Travels to reader processes.

  Attributes:
    tokenizer: turns prompts into token ids.
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
  """One way of joining a language model and an image generator: the core of every system.

  `params` is the tree that checkpoints store; `frozen` holds the networks that never train: an
  argument of every jitted call, in no checkpoint, never closed over. Systems subclass this protocol
  and the capabilities below, and list the capabilities they have.

  Attributes:
    config: the whole run's configuration (vpe_jax.config.Config).
    stages: the stages that the config asks for, in order.
    logical_axes: pairs (regex over parameter paths, axis names of that leaf), first match wins;
      the names are those of vpe_jax.sharding.
    frozen: the frozen networks by name.
    initialization: where the first parameters come from.
    capabilities: the capability protocols that this system implements with its config.
    preprocess: host-side function from records to the inputs of `batch_spec`.
    encoder_settings: JSON-able settings that, beside the weights, decide the encoded entries.
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
    """Initial parameters with those of `initialization.from_frozen` replaced; pure, jittable."""
    del frozen, rng
    return params

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """Names, shapes and dtypes of one batch."""
    ...

  def frozen_shapes(self) -> Params:
    """The frozen networks as `jax.ShapeDtypeStruct` trees by name, of the sizes in the config.

    They have the dtypes of initialization; `checkpoints.frozen.abstract` applies the declared ones.
    """
    return {}

  def encode(self, frozen: Params, inputs: Mapping[str, Array], rng: Array) -> dict[str, Array]:
    """The encoded entries of `batch_spec` from its inputs, by the frozen networks."""
    del frozen, inputs, rng
    return {}

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """The counts that `losses` would return for this batch: parameters are not needed."""
    ...

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """Every loss term of the stage. `rng` is the run's key; `step` counts within the stage."""
    ...

  def tokens(self, stage: Stage) -> int:
    """Tokens that the transformer processes for one training example."""
    ...

  def flops(self, stage: Stage) -> float:
    """Model FLOPs of one training example: forward and backward, nothing recomputed.

    Matrix products only, a multiply-add being two, of what the stage runs, frozen encoders that
    run online included. A product whose input needs no gradient costs one product backward, not
    two, and so does one whose weight is frozen.
    """
    ...

  def attention_flops(self, stage: Stage) -> float:
    """FLOPs of attention between visible pairs, in one forward pass over one example."""
    del stage
    return 0.0

  def frozen_attention_flops(self, stage: Stage) -> float:
    """The part of `attention_flops` that no gradient goes back through."""
    del stage
    return 0.0


class Samples(System, Protocol):
  """Capability: generates images from requests.

  Attributes:
    samples_with: names of the frozen networks that `generate` reads.
    drafts: encoded entries that `draft` samples before rendering, such as a plan of the image.
    draft_encoders: names of the frozen networks that `encode_drafts` reads.
  """

  MISSING: ClassVar[str] = 'does not generate images'

  samples_with: tuple[str, ...]
  drafts: tuple[str, ...] = ()
  draft_encoders: tuple[str, ...] = ()

  def prepare(self, params: Params, platform: str = '') -> Params:
    """Parameters in the layout in which sampling is fast on a platform; called once."""
    del platform
    return params

  def request_spec(self, batch_size: int) -> Batch:
    """The arrays that every request has, as shapes."""
    example = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return Batch(example, self.batch_spec(batch_size).inputs)

  def draft(self, params: Params, request: Batch, rng: Array, settings: Any) -> dict[str, Array]:
    """The entries `drafts` of requests that lack them; nothing is rendered."""
    del params, request, rng, settings
    return {}

  def encode_drafts(self, frozen: Params, images: Array) -> dict[str, Array]:
    """The entries `drafts` of given images [B, R, R, 3] uint8, as in training."""
    del frozen, images
    return {}

  def generate(
    self, params: Params, frozen: Params, request: Batch, rng: Array, settings: Any
  ) -> Generated:
    """One image for each request, drafts included; pure and jittable with `settings` static.

    `request.inputs` has the prompts, `request.example` keys each element's randomness, so that it
    does not depend on its neighbours. Entries of `request.encoded` are used instead of the model's
    own.
    """
    ...

  def decode(self, frozen: Params, encoded: Mapping[str, Array], rng: Array) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of encoded entries."""
    ...


class Edits(Samples, Protocol):
  """Capability: generates images from a source image and an instruction."""

  MISSING: ClassVar[str] = 'does not edit images'

  def encode_source(self, frozen: Params, images: Array) -> dict[str, Array]:
    """The encoded entries of source images [B, R, R, 3] uint8, by networks of `samples_with`."""
    ...


class ScoresImages(Samples, Protocol):
  """Capability: scores how well images fit prompts, by its own frozen networks.

  Good for following a run, not for judging it: vpe_jax.evaluation has an independent network.
  """

  MISSING: ClassVar[str] = 'has no text tower that compares images with prompts'

  def similarity(self, frozen: Params, images: Array, inputs: Mapping[str, Array]) -> Array:
    """Cosines [B, B] of images [B, R, R, 3] in [0, 1] (rows) and prompts (columns)."""
    ...


class PlansVisually(Samples, Protocol):
  """Capability: drafts a visual prompt, a plan of the image in discrete codes [B, P].

  Attributes:
    visual_prompt: the codec of visual prompts (vpe_jax.codecs.protocol).
    codes: entries of its codebook.
    plan_rankers: ranking criteria: `likelihood`, and `similarity` where `plan_similarity` exists.
  """

  MISSING: ClassVar[str] = 'writes no visual prompts apart from its images'

  visual_prompt: Any
  codes: int
  plan_rankers: tuple[str, ...]

  def plan_likelihood(self, params: Params, request: Batch) -> Array:
    """Mean log-probability [B], in nats, of the request's visual prompts given its prompts.

    Of the conditional model at temperature 1, in one pass over the whole sequence.
    """
    ...

  def plan_similarity(self, frozen: Params, request: Batch) -> Array:
    """Cosines [B] of the request's visual prompts and its prompts; of `plan_rankers` only."""
    ...


Capability = TypeVar('Capability')


def supports(system: System, capability: type) -> bool:
  """Whether a system declares a capability."""
  return capability in system.capabilities


def require(system: System, capability: type[Capability]) -> Capability:
  """The system as one with a capability.

  Raises:
    UserError: it does not have the capability.
  """
  if not supports(system, capability):
    raise UserError(f"the system '{system.config.system}' {capability.MISSING}")
  return system
