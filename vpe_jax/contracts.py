"""What the rooms hand to each other: axis letters, rows of tokens, losses, stages, systems.

Axis letters, used in every einsum and shape annotation:
  B batch, L tokens in a row, S keys, N query heads, K key/value heads, H head width,
  D model width, V vocabulary, P patches, C channels; G = N // K query heads per key/value head.

Time: t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t eps, and networks predict v = eps - x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

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
class Examples:
  """One batch as the pipeline hands it over, before it becomes rows of tokens.

  `image` is there when frozen encoders run online (`data.encode=online`), `codes` and `latents`
  when the pipeline reads them from a cache, `near` with `data.near_misses`, and with
  `data.references` `reference` or `reference_latents` alike. The others are None.
  """

  example: Array  # [B] int32: place in the data stream; keys the randomness of the example
  text: Array  # [B, T] int32: caption tokens, padded with 0
  text_length: Array  # [B] int32: tokens of the caption that are real
  image: Array | None = None  # [B, R, R, 3] uint8
  codes: Array | None = None  # [B, P] int32: visual prompt, raster order
  latents: Array | None = None  # [B, h, w, C] float32, or [B, h, w] int32 of discrete pictures
  near: Array | None = None  # [B, M, T] int32: captions that are wrong in one detail
  near_length: Array | None = None  # [B, M] int32: their real tokens; 0 where there is none
  reference: Array | None = None  # [B, R, R, 3] uint8: the picture before an edit
  reference_latents: Array | None = None  # as `latents`, of the picture before


@_pytree
class Region:
  """The tokens of one expert, all `[B, L]`: storage is expert by expert.

  `ids` index the joint vocabulary (text rows first, then visual prompt rows); image and time
  slots hold 0 and get their embedding from elsewhere. `targets` is the id that this token's
  output must predict, `weights` (float32) its weight in the loss; 0 where nothing is predicted.
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
class Drawing:
  """What a generator drew for a batch of requests."""

  image: Array  # [B, R, R, 3] float32 in [0, 1]
  codes: Array  # [B, P] int32: the visual prompt it was rendered from; P = 0 without any
  latents: Array  # [B, h, w, C] float32, or [B, h, w] int32 of a discrete picture


class Weight(Protocol):
  """The weight of a loss that depends on the step of the stage; `str` says how."""

  def at(self, step: Array | int) -> Array:
    """The weight at a step, a float32 scalar."""
    ...


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run: what trains and which losses drive it.

  Attributes:
    name: word used on the command line and in the logs.
    trainable: regular expressions over parameter paths such as `ar/layers/q/kernel`; a leaf
      that none of them matches from its start (`re.match`) is frozen.
    losses: the loss terms that this stage computes, and the weight of each; 0.0 is logged alone.
    ema: whether a moving average of the trainable leaves is kept (with `optim.ema` of 0 none is).
    draws: whether pictures drawn in this stage are worth a look: what draws them has trained.
    watched: names of further loss terms that held-out evaluation computes, at weight 0.
    training: whether losses are asked for a training step; held-out evaluation says no, and no
      activation is dropped then.
  """

  name: str
  trainable: tuple[str, ...]
  losses: Mapping[str, float | Weight]
  ema: bool
  draws: bool = True
  watched: tuple[str, ...] = ()
  training: bool = True

  def weight(self, loss: str, step: Array | int) -> Array | float:
    """The weight of a loss at a step of the stage, as a LossTerm takes it."""
    found = self.losses[loss]
    return found if isinstance(found, (int, float)) else found.at(step)


RUN = 'run'  # the family of a Start whose source is an earlier run


@dataclasses.dataclass(frozen=True)
class Start:
  """Published weights that a run reads: what it starts from, or a frozen network.

  Attributes:
    family: of the published network (vpe_jax.checkpoints.families).
    source: a folder of published weights, an import of them, or a hub id.
    sizes: of the network, as the family's `Sizes`.
    paths: (beginning of a path in the family's tree, what takes its place in ours); a part that
      several of them name is copied, one that none names isn't used.
  """

  family: str
  source: str
  sizes: Any
  paths: tuple[tuple[str, str], ...]


class System(Protocol):
  """One way of joining a language model and an image generator.

  `params` is what checkpoints hold; `frozen` holds networks that never train (encoders and
  decoders): an argument of every jitted call, in no checkpoint, never closed over.

  Attributes:
    config: the whole run's configuration (vpe_jax.config.Config).
    stages: the stages that the config asks for, in order.
    logical_axes: rows of (regex over parameter paths, axis names of that leaf), first match
      wins; the names are those of vpe_jax.sharding.
    frozen_weights: name of each frozen network -> where its weights are (`assets:...` or a
      path); read by vpe_jax.checkpoints.weights.
    published: name -> what it is, for those among them that are published networks, read by
      vpe_jax.checkpoints.converted; only systems that can read some have it.
    draws_with: names of the frozen networks that `generate` reads. This and `codes`: only systems
      that draw have them.
    codes: entries of the visual prompt's codebook; 0 where there is none.
    visual_prompt: the codec of visual prompts (vpe_jax.codecs.protocol.PlanCodec), or None; only
      systems that draw have it.
    picture_codes: entries of the codebook of discrete pictures; only systems that draw those have
      it.
    starts: weights that a new run starts from; only systems whose config can name some have it.
    inherited: (beginning of a path, where `inherit` takes what is there from, in words).
    added: regular expressions over paths of parameters that a run may have beyond those of the run
      that `config.start` names, and that start fresh then.
    grown: what parameters start from that the run lacks whose parameters `config.start` names; of
      family RUN, copies of others of that run. Only systems that grow from others have it.
  """

  config: Any
  stages: tuple[Stage, ...]
  logical_axes: tuple[tuple[str, tuple[str | None, ...]], ...]
  frozen_weights: Mapping[str, str]
  published: Mapping[str, Start]
  draws_with: tuple[str, ...]
  codes: int
  visual_prompt: Any
  picture_codes: int
  starts: tuple[Start, ...]
  inherited: tuple[tuple[str, str], ...]
  added: tuple[str, ...]
  grown: tuple[Start, ...]

  def init(self, rng: Array) -> Params:
    """Fresh parameters; pure and jittable."""
    ...

  def inherit(self, params: Params, frozen: Params, rng: Array) -> Params:
    """Fresh parameters with what they take from the frozen networks; pure and jittable.

    Only systems whose config can ask for this have it.
    """
    ...

  def abstract_batch(self, batch_size: int) -> Examples:
    """The shapes and dtypes of one batch, as `jax.ShapeDtypeStruct` leaves."""
    ...

  def abstract_frozen(self) -> Params:
    """The frozen networks as `jax.ShapeDtypeStruct`, by name, of the sizes in the config.

    What `python -m vpe_jax.compile` puts in the place of weights. Only systems that have frozen
    networks have this.
    """
    ...

  def encode(self, frozen: Params, images: Array) -> tuple[Array, Array]:
    """Codes [B, P] and latents [B, h, w, C] of pictures [B, R, R, 3] uint8.

    Latents of discrete pictures are codes too, [B, h, w] int32.

    Only systems that train on codes and latents have this. One that reads pictures with a frozen
    network in another way has `features(frozen, images)` in its place.
    """
    ...

  def encode_reference(self, frozen: Params, images: Array) -> Array:
    """Latents of pictures before an edit [B, R, R, 3] uint8, with networks of `draws_with` alone.

    Only systems that edit have this: their examples have a `reference`, or `reference_latents`.
    """
    ...

  def decode(self, frozen: Params, latents: Array) -> Array:
    """Pictures [B, R, R, 3] in [0, 1] of latents [B, h, w, C]. Only systems that draw have this."""
    ...

  def abstract_encoded(self, batch_size: int) -> tuple[Any, Any]:
    """What `encode` must return for the model, as `jax.ShapeDtypeStruct`."""
    ...

  def counts(self, batch: Examples, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """The counts that `losses` would return for this batch: parameters are not needed."""
    ...

  def losses(
    self, params: Params, frozen: Params, batch: Examples, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """Every loss term of the stage. `rng` is the run's key; `step` counts within the stage."""
    ...

  def generate(
    self, params: Params, frozen: Params, request: Examples, rng: Array, settings: Any
  ) -> Drawing:
    """Draws one picture a row; pure and jittable with `settings` (SampleConfig) static.

    `request.text` and `text_length` hold the prompts, `request.example` keys each row's
    randomness (so a row doesn't depend on its neighbours), and `request.codes`, when given, is
    rendered instead of a visual prompt of the model's own. Only systems that draw have this.
    """
    ...

  def plan(self, params: Params, request: Examples, rng: Array, settings: Any) -> Array:
    """The visual prompts [B, P] that the model writes for a batch of requests; see `generate`.

    No part of the picture's randomness goes in. Only systems that draw have this; where `codes` is
    0 nothing calls it.
    """
    ...

  def plan_likelihood(self, params: Params, request: Examples) -> Array:
    """The mean log-probability of the visual prompts `request.codes` given the prompts: [B], nats.

    Of the conditional model at temperature 1. One pass over the whole row: it takes drawn plans and
    others alike, in place of as many steps as a plan has codes. Systems that have `plan` have this.
    """
    ...

  def plan_similarity(self, frozen: Params, request: Examples) -> Array:
    """How well the visual prompts `request.codes` fit the prompts: cosines [B].

    It reads the networks that `visual_prompt` does. None where nothing compares the two.
    """
    ...

  def flops(self, stage: Stage) -> float:
    """Model FLOPs of one training example: forward and backward, nothing recomputed.

    Matrix products only, a multiply-add being two, of what the stage runs, frozen encoders that
    run online included. A product whose input needs no gradient costs one product backward, not
    two, and so does one whose weight is frozen.
    """
    ...

  def attention_flops(self, stage: Stage) -> float:
    """Of one forward pass over one example, the FLOPs of attention between what sees each other.

    What a kernel of vpe_jax.ops.attention has to do; only systems that use them have this.
    """
    ...

  def frozen_attention_flops(self, stage: Stage) -> float:
    """Of `attention_flops`, those that no gradient goes back through.

    Only systems that train behind a frozen network of their own parameters have this.
    """
    ...

  def tokens(self, stage: Stage) -> int:
    """Tokens that the transformer processes for one training example."""
    ...
